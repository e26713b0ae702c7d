"""GaLiTe against the numbers of its authors, a float64 reference of our own, and its starting parameters."""

import ast
from pathlib import Path

import galite_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    authors_gates,
    build,
    check_golden,
    count_parameters,
    deviation,
    float64,
    load,
    quick_jit,
    random_params,
    small_args,
)

script = load("ppo_galite_tmaze")


def authors_params(z, args) -> dict:
    """The authors' parameter tree in our shapes: their heads have kernels of their own, ours stand side by side."""
    H = args.num_heads
    dense = lambda g, name: {n: g(f"{name}/{n}") for n in ("kernel", "bias")}
    params = {"embedding": dense(lambda name: z[f"params/layer0/{name}"], "emb_layer")}
    for i in range(args.num_layers):
        g = lambda name, i=i: z[f"params/layer{i}/{name}"]

        def of_heads(name, g=g):
            kernel, bias = g(f"RLTAttentionLayer_0/{name}/kernel"), g(f"RLTAttentionLayer_0/{name}/bias")
            return {"kernel": np.concatenate(list(kernel), axis=1), "bias": bias.reshape(-1)}

        names = {
            "value": "csop/Dense_0", "beta": "csop/Dense_1", "key": "csop/ParameteredProjection_0/Dense_0",
            "p1": "csop/ParameteredProjection_0/Dense_1", "gamma": "csop/ParameteredProjection_1/Dense_0",
            "p3": "csop/ParameteredProjection_1/Dense_1", "query": "Dense_0",
        }  # fmt: skip
        attention = {ours: of_heads(theirs) for ours, theirs in names.items()}
        for ours, theirs in (("query_query", "Dense_0"), ("p2", "Dense_1")):
            for n in ("kernel", "bias"):
                attention[f"{ours}_{n}"] = g(f"RLTAttentionLayer_0/ParameteredProjection_0/{theirs}/{n}")
        assert len(attention["p2_bias"]) == H
        attention["out"] = dense(g, "RLTAttentionLayer_0/Dense_1")
        layer = {"attention": attention} | authors_gates(g, ("GRUGatingUnit_0", "GRUGatingUnit_1"))
        for name in ("LayerNorm_0", "LayerNorm_1"):
            layer[name] = {n: g(f"{name}/{n}") for n in ("scale", "bias")}
        layer |= {name: dense(g, name) for name in ("Dense_0", "Dense_1")}
        params[f"GaLiTeLayer_{i}"] = layer
    return {"params": params}


def test_golden_numbers():
    """Values, input gradients and final memory are those of the authors' code."""
    z = np.load(Path(__file__).parent / "golden" / "galite.npz")
    meta = ast.literal_eval(str(z["meta"]))
    names = {"n_layers": "num_layers", "n_heads": "num_heads"}
    args = script.Args(**{names.get(name, name): value for name, value in meta.items()})
    memory = check_golden(script.GaLiTe(args), authors_params(z, args), z)
    for i, layer in enumerate(memory):
        c, s = z[f"memory/{i}/memory/c"], z[f"memory/{i}/memory/s"]
        assert deviation(layer.matrix.reshape(c.shape), c) <= 5e-6
        assert deviation(layer.norm.reshape(s.shape), s) <= 5e-6


T, B, OBS = 70, 3, 9
RESETS = np.zeros((T, B), bool)
RESETS[[0, 20, 21, 22, T - 1], 0] = True  # at the start, consecutive, at the very end
RESETS[[33, 34], 1] = True  # starts in mid-episode
# the third begins in mid-episode and never ends


def test_agrees_with_a_float64_reference():
    """Values, memory and every derivative are those of the plain formulas in double precision."""
    args = small_args(script)
    _, agent, _ = build(script, args)
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(T, B, OBS)).astype(np.float32)
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
    sizes = args.num_heads, args.d_head, args.eta

    def ours(params, obs, memory):
        logits, value, new = agent.apply(params, obs, RESETS, memory)
        return weighted_sum((logits, value)), (logits, value, new)

    with jax.default_matmul_precision("float32"):
        gradients, (logits, value, new) = quick_jit(jax.grad(ours, (0, 1, 2), has_aux=True))(params, obs, memory)
    states = [tuple(layer) for layer in float64(memory)]
    (expected_logits, expected_value), states = galite_reference.agent(
        float64(params), float64(obs), RESETS, states, sizes, np
    )  # fmt: skip
    assert 0.3 < np.abs(expected_logits).mean() < 10, "activations of order 1"
    assert deviation(logits, expected_logits) < 3e-5
    assert deviation(value, expected_value) < 3e-5
    for layer, (matrix, norm) in zip(new, states, strict=True):
        assert deviation(layer.matrix, matrix) < 5e-6
        assert deviation(layer.norm, norm) < 5e-6

    with jax.enable_x64(True):

        def reference(params, obs, memory):
            outputs, _ = galite_reference.agent(params, obs, RESETS, [tuple(x) for x in memory], sizes, jnp)
            return weighted_sum(outputs)

        inputs = jax.tree.map(jnp.asarray, float64((params, obs, memory)))
        expected = quick_jit(jax.grad(reference, (0, 1, 2)))(*inputs)
        assert jax.tree.leaves(expected)[0].dtype == jnp.float64
        expected = float64(expected)
    assert deviation(gradients, expected) < 3e-4


@pytest.mark.parametrize("gate_init", ["published", "chrono"])
def test_parameters_at_first(gate_init):
    """The published count; each head's kernels orthogonal with gain sqrt 2; with chrono, 1 / gate - 1 of gamma between
    1 and t_max steps."""
    assert count_parameters(script, script.Args(gate_init=gate_init)) == 1_826_405
    args = small_args(script, d_model=16, d_head=8, gate_init=gate_init)
    _, agent, _ = build(script, args)
    obs, reset = jnp.zeros((1, 1, OBS)), jnp.ones((1, 1), bool)
    params = quick_jit(agent.init)(jax.random.key(7), obs, reset, agent.initial_memory(1))["params"]
    attention = float64(params["memory"]["GaLiTeLayer_0"]["attention"])
    chrono, H = gate_init == "chrono", args.num_heads
    for name in ("key", "value", "beta", "gamma", "query", "p1", "p3"):
        gain = np.sqrt(2) * (0.3 if chrono and name == "gamma" else 1)
        for kernel in np.split(attention[name]["kernel"], H, axis=1):  # (D, n), n < D
            np.testing.assert_allclose(kernel.T @ kernel, gain**2 * np.eye(kernel.shape[1]), atol=1e-5)
    for name in ("query_query", "p2"):
        for kernel in attention[f"{name}_kernel"]:  # (d, n)
            np.testing.assert_allclose(kernel.T @ kernel, 2 * np.eye(kernel.shape[1]), atol=1e-5)
        assert not attention[f"{name}_bias"].any()
    np.testing.assert_array_equal(attention["p3"]["bias"], np.full(H * args.eta, float(chrono)))
    for name in ("key", "value", "beta", "query", "p1"):
        assert not attention[name]["bias"].any()
    steps = np.exp(-attention["gamma"]["bias"])
    if chrono:
        assert 1 <= steps.min() < 100 < steps.max() <= args.chrono_t_max and len(np.unique(steps)) == steps.size
    else:
        assert (steps == 1).all()
