"""AGaLiTe against its authors' numbers and against our float64 reference; its initial parameters."""

import ast
from pathlib import Path

import agalite_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    assert_identical,
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

GOLDEN = Path(__file__).parent / "golden"

# The blocks of AGaLiTe are the same text in all scripts, so one script is enough.
script = load("ppo_agalite_tmaze")


# ------------------------------------------------------------------------------------------------------------- Golden
def sizes_to_args(meta: dict):
    names = {"n_layers": "num_layers", "n_heads": "num_heads"}
    return script.Args(**{names.get(name, name): value for name, value in meta.items()})


def authors_params(z, args) -> dict:
    """The authors' parameter tree in our shapes."""
    H, d, e, D = args.num_heads, args.d_head, args.eta, args.d_model
    first = "params/layer1/emb_layer"
    params = {"embedding": {"kernel": z[f"{first}/kernel"], "bias": z[f"{first}/bias"]}}
    for i in range(args.num_layers):
        g = lambda name, i=i: z[f"params/layer{i + 1}/{name}"]
        fused, p, project = (f"AttentionORLiTLayer_0/{n}" for n in ("linear_kqvbetagammas", "linear_p1p2p3", "project"))
        params[f"AGaLiTeAttention_{i}"] = {
            "kernel": g(f"{fused}/kernel").reshape(D, H, 5, d).transpose(0, 2, 1, 3).reshape(D, 5 * H * d),
            "bias": g(f"{fused}/bias").reshape(H, 5, d).transpose(1, 0, 2).reshape(5 * H * d),
            "p": {
                "kernel": g(f"{p}/kernel").reshape(D, H, 3, e).transpose(0, 2, 1, 3).reshape(D, -1),
                "bias": g(f"{p}/bias").reshape(H, 3, e).transpose(1, 0, 2).reshape(-1),
            },
            "out": {name: g(f"{project}/{name}") for name in ("kernel", "bias")},
        }
        for j in range(2):
            params[f"GRUGate_{2 * i + j}"] = authors_gate(g, f"GRUGatingUnit_{j}")
            params[f"LayerNorm_{2 * i + j}"] = {n: g(f"LayerNorm_{j}/{n}") for n in ("scale", "bias")}
            params[f"Dense_{2 * i + j}"] = {n: g(f"Dense_{j}/{n}") for n in ("kernel", "bias")}
    return {"params": params}


def which_frequency(r: int) -> np.ndarray:
    """The index of the state for each frequency of linspace(-pi, pi, r): w and -w share one."""
    return np.minimum(np.arange(r), np.arange(r)[::-1])


def period_of(r: int) -> int:
    """The number of steps after which all cosines repeat."""
    return max(2 * (r - 1), 2)


@pytest.mark.parametrize("r", slow_but([1, 2, 3, 4], [2]))
def test_golden_numbers(r):
    """Values, input gradients and final memory equal those of the authors' code."""
    z = np.load(GOLDEN / f"agalite_r{r}.npz")
    args = sizes_to_args(ast.literal_eval(str(z["meta"])))
    assert args.r == r
    # This holds at r = 4 (period 6), too, although the authors never reset their counter. The last episode begins at
    # step 15, where the counters are half a period apart: this flips both cosines, in keys and values alike, and
    # cancels. The episode of step 5 has one step, and its cosines enter squared, cos(2w)^2 = cos(7w)^2. At step 6 the
    # counters agree.
    memory_0 = script.ActorCritic(args, 4).initial_memory(1)
    memory = check_golden(script.AGaLiTe(args), authors_params(z, args), memory_0, z)
    last_episode = np.flatnonzero(z["terminations"])[-1]
    flipped = np.cos(np.linspace(-np.pi, np.pi, r) * last_episode)  # the authors' counter is not reset
    np.testing.assert_allclose(np.abs(flipped), 1, atol=1e-9)
    for i, layer in enumerate(memory.layers):
        keys, values, norm = (z[f"memory/layer_{i + 1}/{j}"] for j in range(3))  # (r, H, ed), (r, H, d), (H, ed)
        f = which_frequency(r)
        sign = flipped.round()[:, None, None]
        assert deviation(sign * layer.keys[0, f].reshape(keys.shape), keys) <= 5e-6
        assert deviation(sign * layer.values[0, f].reshape(values.shape), values) <= 5e-6
        assert deviation(layer.norm[0].reshape(norm.shape), norm) <= 5e-6
    assert (z["memory/layer_1/3"] - memory.tick - last_episode) % period_of(r) == 0


# ---------------------------------------------------------------------------------------------------------- Reference
T, B, OBS = 70, 3, 14
RESETS = np.zeros((T, B), bool)
RESETS[[0, 20, 21, 22, T - 1], 0] = True  # at the start, consecutive, at the very end
RESETS[[33, 34], 1] = True  # starts in mid-episode
# The third starts in mid-episode and has no reset.


def reference_agent(params, obs, memory, args, xp):
    """agalite_reference.agent with our memory, whose states are copied to all r frequencies."""
    f, period = which_frequency(args.r), period_of(args.r)
    states = tuple(
        (
            xp.stack([layer.keys[:, i].reshape(B, args.num_heads, -1) for i in f]),
            xp.stack([layer.values[:, i] for i in f]),
            layer.norm.reshape(B, args.num_heads, -1),
        )
        for layer in memory.layers
    )
    time = xp.asarray(memory.tick + 5.0 * period)  # any time whose remainder is the tick
    sizes = (args.num_heads, args.d_head, args.eta, args.r)
    return agalite_reference.agent(params, obs, RESETS, time, states, sizes, args.num_layers, args.gamma, xp)


def agent_case(r: int, seed: int = 0):
    """Random parameters, observations and a memory in mid-episode."""
    args = small_args(script, r=r, num_layers=2 if r in (2, 4) else 1)
    _, agent = build(script, args)
    rng = np.random.default_rng(seed)
    obs = random_tmaze_observations(rng, (T, B))
    memory = agent.initial_memory(B)
    layers = []
    for layer in memory.layers:  # |keys| <= norm, as always: keys = norm times a weighted mean of cosines
        norm = rng.uniform(0.1, 2, layer.norm.shape)
        keys, values = norm[:, None] * rng.uniform(-1, 1, layer.keys.shape), rng.normal(size=layer.values.shape)
        layers.append(script.LayerMemory(*(np.float32(x) for x in (keys, values, norm))))
    memory = script.Memory(np.int32(rng.integers(period_of(r), size=B)), tuple(layers))
    params = random_params(jax.eval_shape(agent.init, jax.random.key(0), obs, RESETS, memory), seed)
    return args, agent, params, obs, memory


@pytest.mark.parametrize("r", slow_but([1, 2, 3, 4, 5, 6], [2]))
def test_agrees_with_a_float64_reference(r):
    """Values, memory and all derivatives equal those of the plain formulas in double precision, for every r."""
    args, agent, params, obs, memory = agent_case(r)
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(T, B, 4)), rng.normal(size=(T, B))
    weighted_sum = lambda outputs: sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))

    logits, value, new = quick_jit(agent.apply)(params, obs, RESETS, memory)

    (expected_logits, expected_value), (time, states) = reference_agent(
        float64(params), float64(obs), float64(memory), args, np
    )  # fmt: skip
    assert 0.3 < np.abs(expected_logits).mean() < 10, "activations of order 1"
    # If few queries are positive, and these are small, attention multiplies rounding errors by 1 / query.
    assert deviation(logits, expected_logits) < 3e-5
    assert deviation(value, expected_value) < 3e-5
    f = which_frequency(r)
    np.testing.assert_array_equal(new.tick, time % period_of(r))
    for layer, (keys, values, norm) in zip(new.layers, states, strict=True):
        assert deviation(jnp.moveaxis(layer.keys, 1, 0)[f].reshape(keys.shape), keys) < 5e-6
        assert deviation(jnp.moveaxis(layer.values, 1, 0)[f], values) < 5e-6
        assert deviation(layer.norm.reshape(norm.shape), norm) < 5e-6

    with jax.enable_x64(True):  # in float32 the rounding of a gradient depends on the CPU

        def ours(params, obs, layers):
            return weighted_sum(agent.apply(params, obs, RESETS, memory._replace(layers=layers))[:2])

        def reference(params, obs, layers):
            outputs, _ = reference_agent(params, obs, float_memory._replace(layers=layers), args, jnp)
            return weighted_sum(outputs)

        float_memory = jax.tree.map(jnp.asarray, float64(memory))
        inputs = jax.tree.map(jnp.asarray, float64((params, obs, memory.layers)))
        gradients, expected = (quick_jit(jax.grad(f, (0, 1, 2)))(*inputs) for f in (ours, reference))
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves((gradients, expected)))
        gradients, expected = float64((gradients, expected))
    assert deviation(gradients, expected) < 1e-9


@pytest.mark.parametrize("r", [4, 5])
def test_an_episode_is_the_same_wherever_it_starts(r):
    """A reset restarts the counter, also at r >= 4, where it matters: outputs depend on the episode alone."""
    args, agent, params, obs, _ = agent_case(r)
    length, starts, apply = 20, np.arange(9), quick_jit(agent.apply)  # starts spread over more than a period (6 and 8)
    steps = starts[:, None] + np.arange(length)  # (9, length), of the same episode in nine environments
    episodes, reset = obs[:30, [1] * 9], np.zeros((30, 9), bool)
    for b, start in enumerate(starts):
        episodes[start : start + length, b] = obs[:length, 0]
        reset[[start, start + length], b] = True
    logits, value, _ = apply(params, episodes, reset, agent.initial_memory(9))
    for outcome in (logits, value):
        outcome = np.stack([outcome[steps[b], b] for b in range(9)])
        np.testing.assert_allclose(outcome, outcome[[0] * 9], rtol=0, atol=2e-5 * np.abs(outcome).max())

    # It matters: if the counter runs on, outputs within an episode depend on where it started.
    blank = agent.initial_memory(9)
    shifted = blank._replace(tick=blank.tick + starts.astype(np.int32))
    running_on, _, _ = apply(params, obs[:30, [0] * 9], np.zeros((30, 9), bool), shifted)
    assert np.abs(running_on - running_on[:, :1]).max() > 1e-2


@pytest.mark.parametrize("r", [1, 2, 3, 4, 5])
def test_the_counter_is_exact_forever(r):
    """After 10^6 steps and at any other time, outputs equal those of the counter's remainder in every bit."""
    args, agent, params, obs, memory = agent_case(r)
    obs, reset = obs[:3], np.zeros((3, B), bool)
    period, apply = period_of(r), quick_jit(agent.apply)
    omega = np.linspace(-np.pi, np.pi, r)
    times = np.arange(3 * period)
    np.testing.assert_allclose(np.cos(omega * times[:, None]), np.cos(omega * (times % period)[:, None]), atol=1e-9)

    for time in (10**6, 10**6 + 1, 2**24 + 1, 2**30 + 5):
        late = apply(params, obs, reset, memory._replace(tick=jnp.full(B, time, jnp.int32)))
        early = apply(params, obs, reset, memory._replace(tick=jnp.full(B, time % period, jnp.int32)))
        assert_identical(late, early)
        np.testing.assert_array_equal(late[2].tick, (time + 3) % period)


@pytest.mark.parametrize("r", [1, 2, 3, 4, 5])
def test_an_odd_r_has_a_plain_gated_sum(r):
    """If r is odd and above 1, the keys of frequency 0 equal the norm, so queries and keys cancel in its term."""
    _, agent, params, obs, _ = agent_case(r)
    reset = np.zeros(obs.shape[:2], bool)
    _, _, memory = quick_jit(agent.apply)(params, obs, reset, agent.initial_memory(B))
    omega = np.abs(np.linspace(-np.pi, np.pi, r))
    for layer in memory.layers:
        same = [np.allclose(layer.keys[:, f], layer.norm, atol=1e-6) for f in range(layer.keys.shape[1])]
        assert same == [bool(omega[f] < 1e-6) for f in range((r + 1) // 2)]


# --------------------------------------------------------------------------------------------------------- Parameters
@pytest.mark.parametrize("chrono_steps", [1.0, 300.0])
def test_parameter_count(chrono_steps):
    """The default model has the published size, with either initialisation."""
    assert count_parameters(script, script.Args(chrono_steps=chrono_steps)) == 1_774_277


def initial_params(**changes):
    """-> args, initial parameters of a small agent: a dict from the path, as one string, to the array."""
    args = small_args(script, d_model=16, d_head=8, num_heads=2, eta=3, num_layers=1, **changes)
    _, agent = build(script, args)
    obs, reset = jnp.zeros((1, 1, OBS)), jnp.ones((1, 1), bool)
    params = quick_jit(agent.init)(jax.random.key(7), obs, reset, agent.initial_memory(1))
    leaves = jax.tree_util.tree_leaves_with_path(params["params"])
    return args, {"/".join(key.key for key in path): np.asarray(x) for path, x in leaves}


def assert_orthogonal(kernel, gain: float):
    """Rows or columns, whichever are fewer, are orthogonal and of length gain."""
    kernel = np.float64(kernel)
    short = kernel if kernel.shape[0] <= kernel.shape[1] else kernel.T
    np.testing.assert_allclose(short @ short.T, gain**2 * np.eye(len(short)), atol=1e-5)


@pytest.mark.parametrize("chrono_steps", [1.0, 300.0])
def test_initial_parameters(chrono_steps):
    """Every kernel is orthogonal with gain sqrt 2, in the blocks that the authors draw, and every bias is right. The
    policy's last layer is small, and the critic's bias is --initial-value."""
    args, params = initial_params(chrono_steps=chrono_steps, initial_value=-3.0)
    assert_orthogonal(params.pop("Dense_2/kernel"), 0.1)
    np.testing.assert_array_equal(params.pop("Dense_3/bias"), np.float32([-3.0]))
    D, H, d, e = args.d_model, args.num_heads, args.d_head, args.eta
    gain, kinds, gates = np.sqrt(2), set(), []
    for path, x in params.items():
        owner, name = path.split("/")[-2:]
        kind = f"{owner.split('_')[0]}/{name}"
        if kind == "AGaLiTeAttention/kernel":  # five kernels cut from one (D, 5 H d) matrix
            assert x.shape == (D, 5 * H * d)
            assert_orthogonal(x, gain)
        elif kind == "AGaLiTeAttention/bias":
            of_kqv, of_gates = np.split(x, [3 * H * d])
            assert of_gates.shape == (2 * H * d,) and not of_kqv.any()
            assert (of_gates <= 0).all() and (of_gates >= -np.log(chrono_steps) - 1e-6).all()
            assert len(np.unique(of_gates)) == (of_gates.size if chrono_steps > 1 else 1)
        elif kind == "p/kernel":
            assert x.shape == (D, 3 * H * e)
            assert_orthogonal(x, gain)
        elif kind == "GRUGate/bias":
            np.testing.assert_array_equal(x, np.full(D, 2.0))
        elif kind.startswith("GRUGate"):
            assert x.shape == (D, D)
            assert_orthogonal(x, gain)
            assert all(np.abs(x - other).max() > 0.1 for other in gates), "each is drawn separately"
            gates.append(x)
        elif kind.startswith("LayerNorm"):
            np.testing.assert_array_equal(x, np.full(D, float(name == "scale")))
        elif name == "bias":
            assert not x.any()
        else:
            assert name == "kernel" and x.ndim == 2
            assert_orthogonal(x, gain)
        kinds.add(kind)
    assert len(gates) == 12
    parts = "AGaLiTeAttention p out embedding Dense".split()
    expected = {f"{part}/{name}" for part in parts for name in ("kernel", "bias")}
    expected |= {f"GRUGate/{name}" for name in ("Wr", "Wz", "Wg", "Ur", "Uz", "Ug", "bias")}
    assert kinds == expected | {"LayerNorm/scale", "LayerNorm/bias"}


def test_chrono_spreads_memories_evenly():
    """1 / gate - 1 is uniform between 1 and chrono_steps, for beta and gamma, independently in each layer."""
    args = small_args(script, chrono_steps=300.0, d_head=128, num_heads=4, num_layers=1)
    x, reset, memory = jnp.zeros((1, 1, args.d_model)), jnp.zeros((1, 1)), script.ActorCritic(args, 4).initial_memory(1)
    cos, weight = jnp.ones((1, 1, 2)), jnp.ones(2)
    attention = script.AGaLiTeAttention(args)
    init = quick_jit(lambda key: attention.init(key, x, reset, cos, weight, memory.layers[0]))
    biases = [np.float64(init(jax.random.key(seed))["params"]["bias"][-2 * 512 :]) for seed in range(2)]
    for steps in np.exp(-np.stack(biases)).reshape(4, -1):
        quantiles = (np.sort(steps) - 1) / (300 - 1)
        assert -1e-6 <= quantiles[0] and quantiles[-1] <= 1 + 1e-6
        # Kolmogorov-Smirnov at 512 draws: chance exceeds it once in 10^4 times, and the draws are fixed.
        assert np.abs(quantiles - (np.arange(512) + 0.5) / 512).max() < 2.2 / np.sqrt(512)
    assert np.abs(np.corrcoef(np.reshape(biases, (4, -1))) - np.eye(4)).max() < 0.3, "drawn independently"
