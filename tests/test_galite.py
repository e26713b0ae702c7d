"""GaLiTe against its authors' numbers and against our float64 reference; its initial parameters."""

import ast
from pathlib import Path

import galite_reference
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
    slow_but,
    small_args,
)

script = load("ppo_galite_tmaze")


def authors_params(z, args) -> dict:
    """The authors' parameter tree in our names."""
    params = {"embedding": {n: z[f"params/layer0/emb_layer/{n}"] for n in ("kernel", "bias")}}
    names = {
        "v": "csop/Dense_0", "beta": "csop/Dense_1", "k": "csop/ParameteredProjection_0/Dense_0",
        "p1": "csop/ParameteredProjection_0/Dense_1", "gamma": "csop/ParameteredProjection_1/Dense_0",
        "p3": "csop/ParameteredProjection_1/Dense_1", "query": "Dense_0", "q": "ParameteredProjection_0/Dense_0",
        "p2": "ParameteredProjection_0/Dense_1", "out": "Dense_1",
    }  # fmt: skip
    for i in range(args.num_layers):
        g = lambda name, i=i: z[f"params/layer{i}/{name}"]
        dense = lambda name, g=g: {n: g(f"{name}/{n}") for n in ("kernel", "bias")}
        attention = {ours: dense(f"RLTAttentionLayer_0/{theirs}") for ours, theirs in names.items()}
        assert len(attention["p2"]["bias"]) == args.num_heads
        params[f"GaLiTeAttention_{i}"] = attention
        for j in range(2):
            params[f"GRUGate_{2 * i + j}"] = authors_gate(g, f"GRUGatingUnit_{j}")
            params[f"LayerNorm_{2 * i + j}"] = {n: g(f"LayerNorm_{j}/{n}") for n in ("scale", "bias")}
            params[f"Dense_{2 * i + j}"] = dense(f"Dense_{j}")
    return {"params": params}


def test_golden_numbers():
    """Values, input gradients and final memory equal those of the authors' code."""
    z = np.load(Path(__file__).parent / "golden" / "galite.npz")
    meta = ast.literal_eval(str(z["meta"]))
    names = {"n_layers": "num_layers", "n_heads": "num_heads"}
    args = script.Args(**{names.get(name, name): value for name, value in meta.items()})
    memory_0 = script.ActorCritic(args, 4).initial_memory(1)
    memory = check_golden(script.GaLiTe(args), authors_params(z, args), memory_0, z)
    for i, layer in enumerate(memory):
        c, s = z[f"memory/{i}/memory/c"], z[f"memory/{i}/memory/s"]
        assert deviation(layer.matrix.reshape(c.shape), c) <= 5e-6
        assert deviation(layer.norm.reshape(s.shape), s) <= 5e-6


T, B, OBS = 70, 3, 14
RESETS = np.zeros((T, B), bool)
RESETS[[0, 20, 21, 22, T - 1], 0] = True  # at the start, consecutive, at the very end
RESETS[[33, 34], 1] = True  # starts in mid-episode
# The third starts in mid-episode and has no reset.


def test_agrees_with_a_float64_reference():
    """Values, memory and all derivatives equal those of the plain formulas in double precision."""
    args = small_args(script)
    _, agent = build(script, args)
    rng = np.random.default_rng(0)
    obs = random_tmaze_observations(rng, (T, B))
    blank = agent.initial_memory(B)
    memory = tuple(
        script.MatrixMemory(
            np.float32(rng.normal(size=layer.matrix.shape)), np.float32(rng.uniform(0.1, 2, layer.norm.shape))
        )
        for layer in blank
    )
    params = random_params(jax.eval_shape(agent.init, jax.random.key(0), obs, RESETS, memory))
    weights = rng.normal(size=(T, B, 4)), rng.normal(size=(T, B))
    weighted_sum = lambda outputs: sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))

    logits, value, new = quick_jit(agent.apply)(params, obs, RESETS, memory)
    states = [tuple(layer) for layer in float64(memory)]
    (expected_logits, expected_value), states = galite_reference.agent(
        float64(params), float64(obs), RESETS, states, args.gamma, np
    )  # fmt: skip
    assert 0.3 < np.abs(expected_logits).mean() < 10, "activations of order 1"
    assert deviation(logits, expected_logits) < 3e-5
    assert deviation(value, expected_value) < 3e-5
    for layer, (matrix, norm) in zip(new, states, strict=True):
        assert deviation(layer.matrix, matrix) < 5e-6
        assert deviation(layer.norm, norm) < 5e-6

    with jax.enable_x64(True):  # in float32 the rounding of a gradient depends on the CPU

        def ours(params, obs, memory):
            return weighted_sum(agent.apply(params, obs, RESETS, memory)[:2])

        def reference(params, obs, memory):
            outputs, _ = galite_reference.agent(params, obs, RESETS, [tuple(x) for x in memory], args.gamma, jnp)
            return weighted_sum(outputs)

        inputs = jax.tree.map(jnp.asarray, float64((params, obs, memory)))
        gradients, expected = (quick_jit(jax.grad(f, (0, 1, 2)))(*inputs) for f in (ours, reference))
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves((gradients, expected)))
        gradients, expected = float64((gradients, expected))
    assert deviation(gradients, expected) < 1e-9


@pytest.mark.parametrize("chrono_steps", slow_but([1.0, 300.0], [300.0]))
def test_initial_parameters(chrono_steps):
    """The count is the published one. Each head's kernels are orthogonal with gain sqrt 2; 1 / gate - 1 of gamma is
    between 1 and chrono_steps; all other biases are 0."""
    assert count_parameters(script, script.Args(chrono_steps=chrono_steps)) == 1_826_405
    args = small_args(script, d_model=16, d_head=8, chrono_steps=chrono_steps)
    _, agent = build(script, args)
    obs, reset = jnp.zeros((1, 1, OBS)), jnp.ones((1, 1), bool)
    params = quick_jit(agent.init)(jax.random.key(7), obs, reset, agent.initial_memory(1))["params"]
    attention = float64(params["GaLiTe_0"]["GaLiTeAttention_0"])
    steps = np.exp(-attention["gamma"].pop("bias"))
    assert set(attention) == set("k v beta gamma query q p1 p2 p3 out".split())
    for name, maps in attention.items():
        for kernel in maps["kernel"] if name != "out" else [maps["kernel"]]:  # (D, n) or (d, n) of each head
            short = kernel if kernel.shape[0] <= kernel.shape[1] else kernel.T
            np.testing.assert_allclose(short @ short.T, 2 * np.eye(len(short)), atol=1e-5)
        assert not np.any(maps.get("bias", 0))
        if name != "out":
            assert len(maps["kernel"]) == args.num_heads
            assert np.abs(maps["kernel"][0] - maps["kernel"][1]).max() > 0.1, "each head is drawn separately"
    assert 1 - 1e-5 <= steps.min() and steps.max() <= chrono_steps + 1e-3
    assert len(np.unique(steps)) == (steps.size if chrono_steps > 1 else 1)
    assert chrono_steps == 1 or steps.min() < 100 < 200 < steps.max()
