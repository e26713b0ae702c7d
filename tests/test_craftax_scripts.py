"""What only Craftax's scripts have: encoder and heads, memory saved by unpacking twice, resets, outcomes."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    CLASSIC,
    CRAFTAX,
    build,
    deviation,
    float64,
    load,
    make_env,
    noise_observation,
    quick_jit,
    small_args,
    tiny_args,
)

from envs.craftax import GAMES, Craftax, unpack


@pytest.fixture(scope="module", params=["ppo_agalite_craftax"])  # the tested code is the same text in both
def script(request):
    return load(request.param)


@pytest.mark.parametrize("name, count", [("ppo_agalite_craftax", 2_876_844), ("ppo_gtrxl_craftax", 2_693_676)])
def test_parameter_count(name, count):
    """On Craftax itself, encoder and heads of the default model have the expected sizes. The memory has that of the
    T-Maze, except for eta and the size of its input."""
    script = load(name)
    args = script.Args()
    env = Craftax(args.env_id)
    agent = script.ActorCritic(args, env.action_space(env.default_params).n)
    obs = jnp.zeros((1, 1, *env.observation_space(env.default_params).shape), jnp.uint8)
    start = obs, jnp.ones((1, 1), bool), agent.initial_memory(1)
    params = jax.eval_shape(agent.init, jax.random.key(0), *start)["params"]
    sizes = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in params.items()}
    assert sizes["encoder"] == (GAMES[args.env_id].obs_size + 1) * 128
    assert sizes["Dense_0"] == sizes["Dense_1"] == 129 * 128, "hidden layers of actor and critic"
    assert sizes["Dense_2"] == 129 * 43 and sizes["Dense_3"] == 129
    assert sum(sizes.values()) == count


@pytest.mark.slow
@pytest.mark.parametrize("name", CRAFTAX)
def test_trains_on_the_game_itself(name):
    """`init`, `update` and `evaluate` accept the real game. They are only traced: compiling would take minutes, so
    nothing is computed. Elsewhere the scripts have a stand-in; test_craftax.py plays the game in their environment."""
    script = load(name)
    args = tiny_args(script, env_id="Craftax-Classic-Symbolic-v1")
    env, many = script.make_env(args, args.num_envs), script.make_env(args, 3, evaluation=True)
    agent = script.ActorCritic(args, env.action_space(env.default_params).n)

    def train_and_evaluate(key):
        runner, *reported = script.update(args, env, script.init(args, env, agent, key))
        return runner, reported, script.evaluate(many, agent, runner.train_state.params, key, False)

    runner, (_, outcomes), results = jax.eval_shape(train_and_evaluate, jax.random.key(0))
    assert (runner.obs.shape, runner.obs.dtype) == ((args.num_envs, CLASSIC.packed_size), jnp.uint8)
    for found in (outcomes, results):
        assert sum("achievements/" in name for name in found) == 22 and any("score" in name for name in found)


def test_initial_encoder(script):
    """Its kernel is orthogonal, with the published gain sqrt 2. Its bias is 0. Heads: test_ppo.py."""
    params = quick_jit(script.SymbolEncoder(5).init)(jax.random.key(1), noise_observation(jax.random.key(0), (1, 3)))
    layer = params["params"]["Dense_0"]
    np.testing.assert_allclose(np.linalg.svd(layer["kernel"], compute_uv=False), 2**0.5, rtol=1e-5)
    assert not layer["bias"].any()


def test_encoder_and_heads(script, monkeypatch):
    """Both equal numpy; the encoder reads the unpacked observation."""
    rng = np.random.default_rng(0)
    obs = noise_observation(jax.random.key(0), (2, 3))
    random = lambda *shape: {"kernel": rng.normal(size=shape), "bias": rng.normal(size=shape[1:])}
    params = random(CLASSIC.obs_size, 5)
    dense = lambda p, x: x @ p["kernel"] + p["bias"]
    expected = np.maximum(dense(params, float64(unpack(obs))), 0)
    assert deviation(script.SymbolEncoder(5).apply({"params": {"Dense_0": params}}, obs), expected) < 1e-5

    class NoMemory(nn.Module):
        args: Any

        def __call__(self, x, reset, memory):
            return x, memory

    monkeypatch.setattr(script, "AGaLiTe", NoMemory)
    agent = script.ActorCritic(small_args(script, d_encoder=5, d_actor=6, d_critic=7), 4)
    heads = {"Dense_0": random(5, 6), "Dense_1": random(5, 7), "Dense_2": random(6, 4), "Dense_3": random(7, 1)}
    params = {"params": {"encoder": {"Dense_0": params}} | heads}
    logits, value, _ = agent.apply(params, obs, np.zeros((2, 3), bool), ())
    of = lambda first, last: dense(heads[last], np.maximum(dense(heads[first], expected), 0))
    assert deviation(logits, of("Dense_0", "Dense_2")) < 1e-5
    assert deviation(value, of("Dense_1", "Dense_3")[..., 0]) < 1e-5


def test_unpacked_observations_are_not_kept(script):
    """The forward pass keeps nothing of the size of unpacked observations for backpropagation."""
    args = small_args(script)
    _, agent = build(script, args)
    obs, reset = noise_observation(jax.random.key(0), (8, 3)), jnp.zeros((8, 3), bool)

    def keeps_them(module, *inputs):
        params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        kept = jax.eval_shape(lambda params: jax.vjp(lambda p: module.apply(p, *inputs), params)[1], params)
        return any(x.shape[-1:] == (CLASSIC.obs_size,) for x in jax.tree.leaves(kept))

    assert not keeps_them(agent, obs, reset, agent.initial_memory(3))
    assert keeps_them(script.SymbolEncoder(5), obs), "otherwise the test could not fail"


def test_resets_are_shared_in_training_only_by_so_many(script):
    """Training makes num_envs / optimistic_reset_ratio worlds per step, an evaluation one, for any number of
    environments."""
    args = small_args(script, num_envs=32, optimistic_reset_ratio=8)
    assert make_env(script, args, 32).num_fresh == 4
    fresh = [make_env(script, args, num_envs, evaluation=True).num_fresh for num_envs in (32, 1, 7, 200)]
    assert fresh == [1, 1, 1, 1]


def test_outcomes_of_training(script, monkeypatch):
    """Score and achievements are means over the episodes that ended, each taken at its end."""
    args = small_args(script, num_envs=32)
    env, agent = build(script, args)
    noted, original = {}, script.rollout

    def rollout(*given):
        noted["rollout"] = original(*given)
        return noted["rollout"]

    monkeypatch.setattr(script, "rollout", rollout)
    monkeypatch.setattr(script, "learn", lambda args, train_state, *given: (train_state, {}))

    @quick_jit
    def update(key):
        _, metrics, outcomes = script.update(args, env, script.init(args, env, agent, key))
        _, transitions, infos, _ = noted["rollout"]
        return metrics, outcomes, transitions.done, infos

    metrics, outcomes, done, infos = update(jax.random.key(3))
    infos = {name: float64(x)[np.asarray(done)] for name, x in infos.items()}
    assert metrics["charts/episodes"] == done.sum() > 32
    np.testing.assert_allclose(outcomes["charts/score"], 100 * infos["episodic_return"].mean() / 2.0, rtol=1e-5)
    for i, name in enumerate(("collect_wood", "eat_cow")):
        share = infos["achievements"][:, i].mean()
        assert 0 < share < 1
        np.testing.assert_allclose(outcomes[f"achievements/{name}"], share, rtol=1e-5)


@pytest.mark.slow
def test_outcomes_of_an_evaluation(script):
    """Episodes of an evaluation have outcomes, too. Here the return is one point per achievement."""
    args = small_args(script)
    _, agent = build(script, args)
    env = make_env(script, args, 50, evaluation=True)
    obs, reset = noise_observation(jax.random.key(0), (1, 50)), jnp.ones((1, 50), bool)
    params = quick_jit(agent.init)(jax.random.key(1), obs, reset, agent.initial_memory(50))
    evaluate = quick_jit(functools.partial(script.evaluate, env, agent, greedy=False))
    result = float64(evaluate(params, jax.random.key(2)))
    unlocked = result["achievements/collect_wood"].astype(int) + result["achievements/eat_cow"]
    np.testing.assert_array_equal(unlocked, result["episodic_return"])
    np.testing.assert_allclose(result["score"], 50 * unlocked)
    assert len(set(unlocked)) > 1
