"""GTrXL against its authors' numbers and against our float64 reference, which covers more; its initial parameters."""

import ast
import copy
import dataclasses
from pathlib import Path

import gtrxl_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    authors_gate,
    build,
    check_golden,
    count_parameters,
    deviation,
    float64,
    load,
    quick_jit,
    random_params,
    random_tmaze_observations,
    small_args,
)
from test_ppo import played_by

script = load("ppo_gtrxl_tmaze")


def authors_params(z, args) -> dict:
    """The authors' parameter tree in our names."""
    get = lambda name: z[f"params/{name}"]
    dense = lambda name: {n: get(f"{name}/{n}") for n in ("kernel", "bias")}
    params = {"embedding": dense("embedding/layers_0"), "content_bias": get("u"), "position_bias": get("v")}
    for i in range(args.num_layers):
        first = f"layers_{i}"
        norm = lambda name, first=first: {n: get(f"{first}/{name}/{n}") for n in ("scale", "bias")}
        # The biases of keys and positions are left out: softmax cancels them.
        names = {"q": "attention_q", "position": "project_pos", "out": "project"}
        attention = {ours: dense(f"{first}/attention/{theirs}") for ours, theirs in names.items()}
        kv = dense(f"{first}/attention/attention_kv")
        (Wk, Wv), (_, bv) = np.split(kv["kernel"], 2, axis=1), kv["bias"].reshape(2, args.num_heads, args.d_head)
        attention["position"].pop("bias")
        attention |= {"Wk": Wk, "Wv": Wv, "bv": bv}
        params[f"GTrXLAttention_{i}"] = attention | norm("layernorm1")
        params[f"LayerNorm_{i}"] = norm("layernorm2")
        for j in range(2):
            gate = authors_gate(lambda name, first=first: get(f"{first}/{name}"), f"gate{j + 1}")
            params[f"GRUGate_{2 * i + j}"] = gate
            params[f"Dense_{2 * i + j}"] = dense(f"{first}/mlp/layers_{2 * j}/layers_0")
    return {"params": params}


@pytest.mark.parametrize("name", ["gtrxl_m8", "gtrxl_m40"])
def test_golden_numbers(name):
    """Values, input gradients and final memory equal those of the authors' code."""
    z = np.load(Path(__file__).parent / "golden" / f"{name}.npz")
    meta = ast.literal_eval(str(z["meta"]))
    assert meta.pop("mlp_num") == 2
    names = {"head_dim": "d_head", "embedding_dim": "d_model", "head_num": "num_heads", "layer_num": "num_layers"}
    args = script.Args(**{names.get(name, name): value for name, value in meta.items()})
    memory_0 = script.ActorCritic(args, 4).initial_memory(1)
    memory = check_golden(script.GTrXL(args), authors_params(z, args), memory_0, z)
    inputs, hidden = float64(z["memory/0"][:-1, :, 0]), z["memory/1"]  # (L, M, D), (M,)
    normalised = (inputs - inputs.mean(-1, keepdims=True)) / np.sqrt(inputs.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_array_equal(memory.visible[0], ~hidden)
    shown = np.concatenate(memory.inputs)[:, ~hidden]  # (L, M, D); what is hidden is never read
    assert deviation(shown, normalised[:, ~hidden]) <= 5e-6


T, B, OBS = 70, 3, 14
RESETS = np.zeros((T, B), bool)
RESETS[[0, 20, 21, 22, T - 1], 0] = True  # at the start, consecutive, at the very end
RESETS[[33, 34], 1] = True  # starts in mid-episode
# The third starts in mid-episode and has no reset: 14 windows of 5 steps.


def case(memory_len: int):
    """A small agent with random parameters, observations, and a memory that is partly visible."""
    args = small_args(script, memory_len=memory_len)
    _, agent = build(script, args)
    rng = np.random.default_rng(0)
    obs = random_tmaze_observations(rng, (T, B))
    inputs = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), agent.initial_memory(B).inputs)
    visible = np.arange(memory_len) >= np.array([0, memory_len // 2, memory_len])[:, None]
    memory = script.WindowMemory(inputs, visible)
    params = random_params(jax.eval_shape(agent.init, jax.random.key(0), obs, RESETS, memory))
    return args, agent, params, obs, memory


@pytest.mark.parametrize("memory_len", [1, 5, 7, 16, 100])
def test_agrees_with_a_float64_reference(memory_len):
    """Values, memory and all derivatives equal those of the plain formulas in double precision, for windows that are
    cut into blocks or not, shorter or longer than an episode. No gradient reaches the initial memory."""
    args, agent, params, obs, memory = case(memory_len)
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(T, B, 4)), rng.normal(size=(T, B))
    weighted_sum = lambda outputs: sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))
    sizes = args.num_heads, args.d_head

    def ours(params, obs, inputs):
        logits, value, new = agent.apply(params, obs, RESETS, memory._replace(inputs=inputs))
        return weighted_sum((logits, value)), (logits, value, new)

    (of_params, of_obs, of_memory), (logits, value, new) = quick_jit(jax.grad(ours, (0, 1, 2), has_aux=True))(
        params, obs, memory.inputs
    )
    assert not any(np.any(x) for x in of_memory)
    expected, inputs, visible = gtrxl_reference.agent(
        float64(params), float64(obs), RESETS, float64(memory.inputs), memory.visible, sizes, args.gamma, np
    )
    assert 0.3 < np.abs(expected[0]).mean() < 10, "activations of order 1"
    assert deviation((logits, value), expected) < 3e-5
    assert deviation(new.inputs, inputs) < 5e-6
    np.testing.assert_array_equal(new.visible, visible)

    with jax.enable_x64(True):

        def reference(params, obs):
            outputs, _, _ = gtrxl_reference.agent(
                params, obs, RESETS, inputs_64, memory.visible, sizes, args.gamma, jnp
            )
            return weighted_sum(outputs)

        inputs_64 = jax.tree.map(jnp.asarray, float64(memory.inputs))
        expected = quick_jit(jax.grad(reference, (0, 1)))(*jax.tree.map(jnp.asarray, float64((params, obs))))
        assert jax.tree.leaves(expected)[0].dtype == jnp.float64
        expected = float64(expected)
    assert deviation((of_params, of_obs), expected) < 3e-4


def test_a_step_sees_just_its_window():
    """With one layer, an observation changes outputs up to M steps later, but no further. Two layers reach twice as
    far."""
    args, agent, params, obs, memory = case(memory_len=5)
    apply = quick_jit(agent.apply)
    none = np.zeros((T, B), bool)
    logits, _, _ = apply(params, obs, none, memory)
    other = obs.copy()
    other[30] += 1.0
    changed, _, _ = apply(params, other, none, memory)
    moved = np.abs(changed - logits).max((1, 2)) > 1e-6
    reach = args.num_layers * args.memory_len
    assert moved[30 : 30 + reach + 1].all() and not moved[:30].any() and not moved[30 + reach + 1 :].any()


def test_acting_makes_no_keys():
    """Per step of the window, acting costs its position and less than a tenth of its keys and values."""
    operations, B = [], 3
    for memory_len in (100, 200):
        args = script.Args(memory_len=memory_len)
        agent = script.ActorCritic(args, 4)
        start = jnp.zeros((1, B, OBS)), jnp.zeros((1, B), bool), agent.initial_memory(B)
        params = jax.eval_shape(agent.init, jax.random.key(0), *start)
        operations.append(jax.jit(agent.apply).lower(params, *start).cost_analysis()["flops"])
    positions = 2 * args.d_model * args.num_heads * args.d_head  # of one step, for all environments
    keys_and_values = 2 * B * positions
    assert operations[1] - operations[0] < 100 * args.num_layers * (positions + 0.1 * keys_and_values)


@pytest.mark.slow
def test_ratio_one_notices_a_missing_window():
    """If learning saw further back than acting, as the authors' does, the ratio would not be 1."""
    played = copy.copy(played_by("ppo_gtrxl_tmaze"))
    M = played.args.memory_len
    wide = script.ActorCritic(dataclasses.replace(played.args, memory_len=2 * M), 4)
    inputs, visible = played.memory
    longer = lambda x: jnp.pad(x, [(0, 0), (M, 0), (0, 0)][: x.ndim])
    further = script.WindowMemory(*jax.tree.map(longer, (inputs, visible)))
    assert max(played.errors()) <= 1e-4
    played.apply = jax.jit(wide.apply)
    assert min(played.errors(memory=further)) > 1e-2


def test_initial_parameters():
    """The count is the published one without biases that cancel. Kernels are drawn as in Flax; biases are 0 or 2."""
    assert count_parameters(script, script.Args()) == 1_617_925 - 4 * 2 * 256  # of keys and positions
    args = small_args(script, d_model=64, d_head=24)  # H * d is not D, so no kernel can pass for another
    _, agent = build(script, args)
    obs, reset = jnp.zeros((1, 1, OBS)), jnp.ones((1, 1), bool)
    params = quick_jit(agent.init)(jax.random.key(7), obs, reset, agent.initial_memory(1))["params"]
    memory = float64(params["GTrXL_0"])
    np.testing.assert_array_equal(memory["GRUGate_0"]["bias"], np.full(64, 2.0))
    assert not np.any(memory["content_bias"]) and not np.any(memory["position_bias"])
    kernels = [memory[f"GRUGate_{i}"][name] for i in (0, 1) for name in ("Wr", "Wz", "Wg", "Ur", "Uz", "Ug")]
    key_value = np.concatenate([memory["GTrXLAttention_0"][name] for name in ("Wk", "Wv")], axis=1)
    for path, x in jax.tree.leaves_with_path(memory):
        if path[-1].key == "kernel":  # of variance 1 / inputs
            assert abs(x.std() * np.sqrt(len(x)) - 1) < 0.1, path
    for kernel in (*kernels, key_value):  # (64, n), of variance 1 / 64
        assert abs(kernel.std() * 8 - 1) < 0.05 and abs(kernel.mean()) < 0.01
        assert np.abs(kernel[:, :64].T @ kernel[:, :64] - np.eye(64)).max() > 0.2, "not orthogonal"
    assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(kernels) for b in kernels[:i]), "drawn separately"
