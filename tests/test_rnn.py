"""LSTM and GRU against their formulas in float64; their initial parameters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agalite_reference import heads
from common import (
    assert_close,
    build,
    count_parameters,
    deviation,
    float64,
    load,
    quick_jit,
    random_params,
    random_tmaze_observations,
    small_args,
)

NAMES = ["lstm", "gru"]
T, B, OBS = 40, 3, 14
RESETS = np.zeros((T, B), bool)
RESETS[[0, 20, 21, 22, T - 1], 0] = True  # at the start, consecutive, at the very end
RESETS[[33, 34], 1] = True  # starts in mid-episode


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_step(p, x, memory):
    """Hochreiter and Schmidhuber 1997, with forget gates."""
    c, h = memory
    i, f, g, o = (x @ p[f"i{n}"]["kernel"] + h @ p[f"h{n}"]["kernel"] + p[f"h{n}"]["bias"] for n in "ifgo")
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(c)
    return (c, h), h


def gru_step(p, x, memory):
    """Cho et al. 2014, with the reset gate after the recurrent product."""
    (h,) = memory
    of_x = {n: x @ p[f"i{n}"]["kernel"] + p[f"i{n}"]["bias"] for n in "rzn"}
    r, z = (sigmoid(of_x[n] + h @ p[f"h{n}"]["kernel"]) for n in "rz")
    n = np.tanh(of_x["n"] + r * (h @ p["hn"]["kernel"] + p["hn"]["bias"]))
    h = (1 - z) * n + z * h
    return (h,), h


def cell_of(name: str, own):
    """The parameters of our LSTM or GRU in the layout of Flax's cells."""
    gates = {"lstm": "ifgo", "gru": "rzn"}[name]
    cell = {f"i{gate}": own[f"Dense_{number}"] for number, gate in enumerate(gates)}
    cell |= {f"h{gate}": {"kernel": own[f"kernel_{gate}"]} for gate in gates}
    of_gates = zip(gates, own["bias"].reshape(4, -1), strict=True) if name == "lstm" else [("n", own["bias"])]
    for gate, bias in of_gates:
        cell[f"h{gate}"]["bias"] = bias
    return cell


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_a_float64_reference(name):
    """Values and memory equal those of the plain formulas in double precision, over resets, from a memory in
    mid-episode."""
    script = load(f"ppo_{name}_tmaze")
    args = small_args(script)
    _, agent = build(script, args)
    rng = np.random.default_rng(0)
    obs = random_tmaze_observations(rng, (T, B))
    memory = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), agent.initial_memory(B))
    params = random_params(jax.eval_shape(agent.init, jax.random.key(0), obs, RESETS, memory))
    logits, value, new = quick_jit(agent.apply)(params, obs, RESETS, memory)

    params, state, expected = float64(params), float64(memory), []
    cell, step = cell_of(name, params["params"][f"{name.upper()}_0"]), {"lstm": lstm_step, "gru": gru_step}[name]
    for t in range(T):
        state = jax.tree.map(lambda x, t=t: np.where(RESETS[t][:, None], 0, x), state)
        state, h = step(cell, np.float64(obs[t, :, 5:]), state)
        expected.append(heads(params["params"], h, np.float64(obs[t]), args.gamma, np))
    expected_logits, expected_value = (np.stack(x) for x in zip(*expected, strict=True))
    assert 0.3 < np.abs(expected_logits).mean() < 10, "activations of order 1"
    assert deviation(logits, expected_logits) < 1e-5
    assert deviation(value, expected_value) < 1e-5
    assert deviation(new, state) < 5e-6


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_cell_of_flax(name):
    """Outputs, memory and all gradients equal those of Flax's cell in a plain loop, over resets and under vmap."""
    script = load(f"ppo_{name}_tmaze")
    ours, cell = (script.LSTM(11), nn.OptimizedLSTMCell(11)) if name == "lstm" else (script.GRU(11), nn.GRUCell(11))
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    x, memory = draw(2, T, B, OBS), tuple(draw(2, B, 11) for _ in range(2 if name == "lstm" else 1))
    first = jax.tree.map(lambda m: m[0], memory)
    params = random_params(jax.eval_shape(ours.init, jax.random.key(0), x[0], RESETS, first))

    def of_flax(params, x, reset, memory):
        def step(memory, inputs):
            x, reset = inputs
            memory = jax.tree.map(lambda m: jnp.where(reset[:, None], 0, m), memory)
            of_cell = {"params": cell_of(name, params["params"])}
            memory, h = cell.apply(of_cell, memory if name == "lstm" else memory[0], x)
            return memory if name == "lstm" else (memory,), h

        memory, h = jax.lax.scan(step, memory, (x, reset))
        return h, memory

    def loss(apply, params, x, memory):
        h, memory = apply(params, x, RESETS, memory)
        return jnp.sin(3 * h).sum() + sum(jnp.cos(2 * m).sum() for m in memory)

    both = []
    for apply in (ours.apply, of_flax):
        gradients = jax.value_and_grad(functools.partial(loss, apply), (0, 1, 2))
        both.append(quick_jit(jax.vmap(gradients, (None, 0, 0)))(params, x, memory))
    assert_close(*both, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_initial_parameters(name):
    """The count is the published one; every kernel is orthogonal with gain sqrt 2, every bias is 0."""
    script = load(f"ppo_{name}_tmaze")
    assert count_parameters(script, script.Args()) == {"lstm": 1_635_301, "gru": 1_597_541}[name]
    args = small_args(script, hidden_size=32)
    _, agent = build(script, args)
    obs, reset = jnp.zeros((1, 1, OBS)), jnp.ones((1, 1), bool)
    params = quick_jit(agent.init)(jax.random.key(7), obs, reset, agent.initial_memory(1))
    cell = cell_of(name, float64(params)["params"][f"{name.upper()}_0"])
    assert len(cell) == {"lstm": 8, "gru": 6}[name]
    for of_gate in cell.values():
        kernel = of_gate["kernel"]
        short = kernel if kernel.shape[0] <= kernel.shape[1] else kernel.T
        np.testing.assert_allclose(short @ short.T, 2 * np.eye(len(short)), atol=1e-5)
        assert not np.any(of_gate.get("bias", 0))
