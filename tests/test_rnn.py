"""LSTM and GRU against their formulas in float64, and their starting parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import build, count_parameters, deviation, float64, load, quick_jit, random_params, small_args

NAMES = ["lstm", "gru"]
T, B, OBS = 40, 3, 9
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


def gru_step(p, x, h):
    """Cho et al. 2014, with the reset gate after the recurrent product."""
    of_x = {n: x @ p[f"i{n}"]["kernel"] + p[f"i{n}"]["bias"] for n in "rzn"}
    r, z = (sigmoid(of_x[n] + h @ p[f"h{n}"]["kernel"]) for n in "rz")
    n = np.tanh(of_x["n"] + r * (h @ p["hn"]["kernel"] + p["hn"]["bias"]))
    h = (1 - z) * n + z * h
    return h, h


def head(p, x):
    hidden = np.tanh(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
    return hidden @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_a_float64_reference(name):
    """Values and memory are those of the plain formulas in double precision, over resets, from a memory in
    mid-episode."""
    script = load(f"ppo_{name}_tmaze")
    args = small_args(script)
    _, agent, _ = build(script, args)
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(T, B, OBS)).astype(np.float32)
    memory = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), agent.initial_memory(B))
    params = random_params(jax.eval_shape(agent.init, jax.random.key(0), obs, RESETS, memory))
    with jax.default_matmul_precision("float32"):
        logits, value, new = quick_jit(agent.apply)(params, obs, RESETS, memory)

    p, step, expected, state = (
        float64(params)["params"],
        {"lstm": lstm_step, "gru": gru_step}[name],
        [],
        float64(memory),
    )
    for t in range(T):
        state = jax.tree.map(lambda x, t=t: np.where(RESETS[t][:, None], 0, x), state)
        state, h = step(p["memory"]["cell"], np.float64(obs[t]), state)
        expected.append((head(p["actor"], h), head(p["critic"], h)[:, 0]))
    expected_logits, expected_value = (np.stack(x) for x in zip(*expected, strict=True))
    assert 0.3 < np.abs(expected_logits).mean() < 10, "activations of order 1"
    assert deviation(logits, expected_logits) < 1e-5
    assert deviation(value, expected_value) < 1e-5
    assert deviation(new, state) < 5e-6


@pytest.mark.parametrize("gate_init", ["published", "chrono"])
@pytest.mark.parametrize("name", NAMES)
def test_parameters_at_first(name, gate_init):
    """Every kernel orthogonal with gain sqrt 2, every bias 0, but for the gates with chrono: log x, x ~ U(1, t_max)."""
    script = load(f"ppo_{name}_tmaze")
    count = count_parameters(script, script.Args(gate_init=gate_init))
    assert count == {"lstm": 1_635_301, "gru": 1_597_541}[name]
    args = small_args(script, hidden_size=32, gate_init=gate_init)
    _, agent, _ = build(script, args)
    obs, reset = jnp.zeros((1, 1, OBS)), jnp.ones((1, 1), bool)
    params = quick_jit(agent.init)(jax.random.key(7), obs, reset, agent.initial_memory(1))["params"]
    cell = float64(params["memory"]["cell"])
    for of_gate in cell.values():
        kernel = of_gate["kernel"]
        short = kernel if kernel.shape[0] <= kernel.shape[1] else kernel.T
        np.testing.assert_allclose(short @ short.T, 2 * np.eye(len(short)), atol=1e-5)
    biases = {name: of_gate["bias"] for name, of_gate in cell.items() if "bias" in of_gate}
    if gate_init == "chrono":
        kept = biases.pop("hf" if name == "lstm" else "iz")
        steps = np.exp(kept)
        assert 1 <= steps.min() < 60 < 240 < steps.max() <= args.chrono_t_max and len(np.unique(steps)) == 32
        if name == "lstm":
            np.testing.assert_allclose(biases.pop("hi"), -kept, atol=1e-6)
    assert not any(bias.any() for bias in biases.values())
