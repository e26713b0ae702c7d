"""What Craftax's scripts have of their own: encoder and heads, memory saved by unpacking twice, resets, outcomes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import CLASSIC, CRAFTAX, build, deviation, float64, load, make_env, noise_observation, quick_jit, small_args

from envs.craftax import GAMES, Craftax, unpack


@pytest.fixture(scope="module", params=CRAFTAX[:1])  # what is tested with it is the same text in both
def script(request):
    return load(request.param)


@pytest.mark.parametrize("name, count", [(CRAFTAX[0], 2_876_844), (CRAFTAX[1], 2_695_724)])
def test_parameter_count(name, count):
    """Of the default model on Craftax itself: what encoder and heads should have, and the memory of the T-Maze's size
    but for eta and the size of its input."""
    script = load(name)
    args = script.Args()
    env = Craftax(args.env_id)
    agent = script.ActorCritic(args, env.action_space(env.default_params).n)
    obs = jnp.zeros((1, 1, *env.observation_space(env.default_params).shape), jnp.uint8)
    start = obs, jnp.ones((1, 1), bool), agent.initial_memory(1)
    params = jax.eval_shape(agent.init, jax.random.key(0), *start)["params"]
    sizes = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in params.items()}
    assert sizes["encoder"] == (GAMES[args.env_id].obs_size + 1) * 128
    assert sizes["actor"] == 129 * 128 + 129 * 43 and sizes["critic"] == 129 * 128 + 129
    assert sum(sizes.values()) == count


def test_parameters_at_first(script):
    """Orthogonal kernels of the published gains: sqrt 2 and relu, then 2 and relu, then 0.01 or 1; biases 0."""
    _, agent, _ = build(script, small_args(script))
    obs, reset = noise_observation(jax.random.key(0), (1, 3)), jnp.ones((1, 3), bool)
    start = obs, reset, agent.initial_memory(3)
    params = float64(quick_jit(agent.init)(jax.random.key(1), *start)["params"])
    gains = {("encoder", "Dense_0"): 2**0.5, ("actor", "Dense_0"): 2, ("actor", "Dense_1"): 0.01}
    gains |= {("critic", "Dense_0"): 2, ("critic", "Dense_1"): 1}
    for (part, layer), gain in gains.items():
        kernel, bias = params[part][layer]["kernel"], params[part][layer]["bias"]
        np.testing.assert_allclose(np.linalg.svd(kernel)[1], gain, rtol=1e-5)
        assert not bias.any()


def test_encoder_and_head(script):
    """Both against numpy; the encoder reads the observation that was packed."""
    rng = np.random.default_rng(0)
    obs = noise_observation(jax.random.key(0), (2, 3))
    params = {"kernel": rng.normal(size=(CLASSIC.obs_size, 5)), "bias": rng.normal(size=5)}
    expected = np.maximum(float64(unpack(obs)) @ params["kernel"] + params["bias"], 0)
    assert deviation(script.SymbolEncoder(5).apply({"params": {"Dense_0": params}}, obs), expected) < 1e-5
    x = rng.normal(size=(2, 3, 7))
    layers = [{"kernel": rng.normal(size=shape), "bias": rng.normal(size=shape[1])} for shape in ((7, 6), (6, 4))]
    expected = np.maximum(x @ layers[0]["kernel"] + layers[0]["bias"], 0) @ layers[1]["kernel"] + layers[1]["bias"]
    head = script.ReluHead(6, 4, gain=1.0)
    assert deviation(head.apply({"params": {"Dense_0": layers[0], "Dense_1": layers[1]}}, x), expected) < 1e-5


def test_unpacked_observations_are_not_kept(script):
    """Of what the forward pass leaves to backpropagation nothing has the size of unpacked observations."""
    args = small_args(script)
    _, agent, _ = build(script, args)
    obs, reset = noise_observation(jax.random.key(0), (8, 3)), jnp.zeros((8, 3), bool)

    def keeps_them(module, *inputs):
        params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        kept = jax.eval_shape(lambda params: jax.vjp(lambda p: module.apply(p, *inputs), params)[1], params)
        return any(x.shape[-1:] == (CLASSIC.obs_size,) for x in jax.tree.leaves(kept))

    assert not keeps_them(agent, obs, reset, agent.initial_memory(3))
    assert keeps_them(script.SymbolEncoder(5), obs), "or the test could not fail"


def test_resets_are_shared_in_training_only_by_so_many(script):
    """Training makes num_envs / optimistic_reset_ratio worlds a step, an evaluation one, of whatever number."""
    args = small_args(script, num_envs=32, optimistic_reset_ratio=8)
    fresh = {num_envs: make_env(script, args, num_envs).num_fresh for num_envs in (32, 1, 7, 200)}
    assert fresh == {32: 4, 1: 1, 7: 1, 200: 1}


def test_outcomes_of_training(script, monkeypatch):
    """Score and achievements are means over the episodes that ended, each as it was at its end."""
    args = small_args(script, num_envs=32)
    env, agent, optimizer = build(script, args)
    noted, original = {}, script.rollout

    def rollout(*given):
        runner, transitions, noted["infos"], last_value = original(*given)
        return runner, transitions, noted["infos"], last_value

    monkeypatch.setattr(script, "rollout", rollout)
    monkeypatch.setattr(script, "learn", lambda *given: (given[3].params, given[3].opt_state, {}))

    @quick_jit
    def update(key):
        _, metrics = script.update(args, env, agent, optimizer, script.init(args, env, agent, optimizer, key))
        return metrics, noted["infos"]

    metrics, infos = float64(update(jax.random.key(3)))
    done = infos["done"].astype(bool)
    assert metrics["charts/episodes"] == done.sum() > 32
    np.testing.assert_allclose(metrics["charts/score"], 100 * infos["episodic_return"][done].mean() / 2.0, rtol=1e-5)
    for i, name in enumerate(("collect_wood", "eat_cow")):
        share = infos["achievements"][done][:, i].mean()
        assert 0 < share < 1
        np.testing.assert_allclose(metrics[f"achievements/{name}"], share, rtol=1e-5)


def test_outcomes_of_an_evaluation(script):
    """Its episodes have outcomes too; here a point for each achievement is all there is to earn."""
    args = small_args(script)
    _, agent, _ = build(script, args)
    env = make_env(script, args, 50)
    obs, reset = noise_observation(jax.random.key(0), (1, 50)), jnp.ones((1, 50), bool)
    params = quick_jit(agent.init)(jax.random.key(1), obs, reset, agent.initial_memory(50))
    evaluate = quick_jit(functools.partial(script.evaluate, args, env, agent, greedy=False))
    result = float64(evaluate(params, jax.random.key(2)))
    unlocked = result["achievements/collect_wood"].astype(int) + result["achievements/eat_cow"]
    np.testing.assert_array_equal(unlocked, result["episodic_return"])
    np.testing.assert_allclose(result["score"], 50 * unlocked)
    assert len(set(unlocked)) > 1
