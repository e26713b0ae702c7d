"""The wrappers on the T-Maze and on a small environment whose outputs tell which key and step they come from."""

import math
import pickle
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import quick_jit
from PIL import Image
from tmaze_reference import RIGHT, Reference

from envs.mysterypath import MysteryPath
from envs.tmaze import EnvParams, TMaze
from envs.wrappers import (
    AutoReset,
    EpisodeNoise,
    EpisodeStatistics,
    OptimisticReset,
    PooledReset,
    TimeAwareObservation,
    VectorEnv,
    record_video,
)


class ToyState(NamedTuple):
    tag: jax.Array  # () uint32, names the episode
    clock: dict[str, jax.Array]  # a pytree in the state, {"time": () int32}


class Toy:
    """Episodes of 1 to 4 steps; the observation is (tag, time), the reward 10 ** time before the step."""

    def reset(self, key, params):
        state = ToyState(jax.random.bits(key), {"time": jnp.zeros((), jnp.int32)})
        return self.observe(state, params), state

    def step(self, key, state, action, params):
        time = state.clock["time"] + 1
        done = time > state.tag % 4
        info = {"tag": state.tag, "noise": jax.random.bits(key), "action": action}
        reward = 10.0 ** (time - 1)
        state = ToyState(state.tag, {"time": time})
        return self.observe(state, params), state, reward, done, info

    def observe(self, state, params):
        return {"tag": state.tag, "time": state.clock["time"]}


@partial(quick_jit, static_argnums=0)
def rollout(env, params, key, actions):
    """actions (T, ...) -> first obs, then obs, state, reward, done, info, each (T, ...), all by lax.scan."""
    reset_key, step_key = jax.random.split(key)
    first_obs, state = env.reset(reset_key, params)

    def step(state, key_action):
        key, action = key_action
        obs, state, reward, done, info = env.step(key, state, action, params)
        return state, (obs, state, reward, done, info)

    return first_obs, *jax.lax.scan(step, state, (jax.random.split(step_key, len(actions)), actions))[1]


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_episode_statistics():
    """They count up to the end of the episode, and pass on everything else unchanged."""
    key, params, actions = jax.random.key(0), EnvParams(6, 1000), np.array([3, 0, 2, 3, 3, 3, 3, 3, 1])
    plain = rollout(TMaze(), params, key, actions)
    first_obs, obs, state, reward, done, info = rollout(EpisodeStatistics(TMaze()), params, key, actions)
    np.testing.assert_allclose(info["episodic_return"], np.cumsum(reward), rtol=1e-6)
    np.testing.assert_array_equal(info["episodic_length"], np.arange(1, 10))
    assert info["episodic_return"].dtype == jnp.float32 and info["episodic_length"].dtype == jnp.int32
    assert done[-1] and float(reward[-1]) in (4.0, -1.0)
    inner_info = {name: info[name] for name in ("success", "truncated")}
    assert_trees_equal((first_obs, obs, state.env_state, reward, done, inner_info), plain)


def test_auto_reset():
    """At an end, observation and state begin again; reward, done and info are those of the last step."""
    first_obs, obs, state, reward, done, info = jax.tree.map(
        np.asarray, rollout(AutoReset(Toy()), None, jax.random.key(1), np.arange(300))
    )
    tag, time = int(first_obs["tag"]), 0
    tags = [tag]
    for t in range(300):
        time += 1
        assert info["tag"][t] == tag and info["action"][t] == t
        np.testing.assert_allclose(reward[t], 10.0 ** (time - 1), rtol=1e-6)
        assert done[t] == (time > tag % 4)
        if done[t]:
            tag, time = int(obs["tag"][t]), 0
            tags.append(tag)
        assert (obs["tag"][t], obs["time"][t]) == (tag, time)
        assert (state.tag[t], state.clock["time"][t]) == (tag, time)
    assert len(set(tags)) == len(tags) > 75  # a new draw for each episode
    # The draws of the step and of the reset come from two keys: from one they would be the same.
    assert not (obs["tag"] == info["noise"])[done].any()


def test_statistics_begin_anew_with_the_episode():
    _, _, state, _, done, info = rollout(AutoReset(EpisodeStatistics(Toy())), None, jax.random.key(2), np.zeros(100))
    lengths = np.asarray(info["tag"] % 4 + 1)[done]
    assert set(lengths) == {1, 2, 3, 4}
    np.testing.assert_array_equal(info["episodic_length"][done], lengths)
    np.testing.assert_allclose(info["episodic_return"][done], [float("1" * n) for n in lengths])
    assert not state.episodic_return[done].any() and not state.episodic_length[done].any()
    assert state.episodic_length[~done].all()


@pytest.mark.parametrize("corridor_len, limit", [(2, 4), (3, 9)])
def test_whole_stack_equals_the_reference(corridor_len, limit):
    """Many consecutive episodes in each of 16 environments, with every kind of end, equal the reference."""
    num_envs, num_steps = 16, 200
    env = VectorEnv(AutoReset(EpisodeStatistics(TMaze())), num_envs)
    actions = np.random.default_rng(0).choice(4, (num_steps, num_envs), p=[0.1, 0.1, 0.3, 0.5])
    out = rollout(env, EnvParams(corridor_len, limit), jax.random.key(3), actions)
    first_obs, obs, _, reward, done, info = jax.tree.map(np.asarray, out)
    assert obs.shape == (num_steps, num_envs, 16)

    def new_episode(obs):
        cue = {(0, 1): "up", (1, 0): "down"}[tuple(obs[:2].astype(int))]
        reference = Reference(corridor_len, limit, cue)
        np.testing.assert_array_equal(obs, reference.first_obs + [0] * 6)
        return reference

    endings = set()
    for i in range(num_envs):
        reference = new_episode(first_obs[i])
        for t in range(num_steps):
            bits, *expected = reference.step(actions[t, i])
            found = [reward[t, i], done[t, i], info["truncated"][t, i], info["success"][t, i]]
            assert found == [np.float32(expected[0]), *expected[1:]]
            assert info["episodic_length"][t, i] == reference.steps
            assert abs(info["episodic_return"][t, i] - reference.total) < 1e-5
            if done[t, i]:
                endings.add((reference.cue, *expected[2:]))
                reference = new_episode(obs[t, i])
            else:
                assert obs[t, i, :10].tolist() == bits
    assert endings == {(cue, *end) for cue in ("up", "down") for end in ((True, False), (False, True), (False, False))}


def test_each_episode_has_a_new_cue():
    """It is a fair coin, independent of the previous cue and the neighbour's; the cue shown is the one rewarded."""
    num_envs, num_steps = 64, 200
    env = VectorEnv(AutoReset(EpisodeStatistics(TMaze())), num_envs)
    # In a corridor of 2 an episode is a step to the right and a turn: here always up, so correct if the cue was up.
    actions = np.tile([[RIGHT], [0]], (num_steps // 2, num_envs))
    first_obs, obs, _, _, done, info = rollout(env, EnvParams(2, 1000), jax.random.key(4), actions)
    assert done[1::2].all() and not done[::2].any()
    shown = np.concatenate([first_obs[None], obs[1::2]])[..., 1]  # (101, 64), 1 if the cue was up
    np.testing.assert_array_equal(shown[:-1] == 1, info["success"][1::2])
    coins = 2 * shown - 1
    for product in (coins, coins[1:] * coins[:-1], coins[:, 1:] * coins[:, :-1]):
        assert abs(product.mean()) < 5 / np.sqrt(product.size)


def test_vector_env_equals_single_environments():
    """With the keys of jax.random.split, through ends of episodes; single calls equal lax.scan."""
    single, params, key = AutoReset(EpisodeStatistics(TMaze())), EnvParams(2, 4), jax.random.key(5)
    actions = np.random.default_rng(1).integers(4, size=(8, 3))
    scanned = jax.tree.map(np.asarray, rollout(VectorEnv(single, 3), params, key, actions))
    assert scanned[4].any()

    reset_key, steps_key = jax.random.split(key)
    reset, step = jax.jit(single.reset), jax.jit(single.step)
    for i in range(3):
        obs, state = reset(jax.random.split(reset_key, 3)[i], params)
        assert_trees_equal(obs, scanned[0][i])
        for t, step_key in enumerate(jax.random.split(steps_key, 8)):
            out = step(jax.random.split(step_key, 3)[i], state, actions[t, i], params)
            assert_trees_equal(out, jax.tree.map(lambda x: x[t, i], scanned[1:]))  # noqa: B023
            state = out[1]


def test_environments_have_randomness_of_their_own():
    env = VectorEnv(TMaze(num_distractors=64), 8)
    _, obs, *_ = rollout(env, env.default_params, jax.random.key(6), np.zeros((1, 8), int))
    assert len(np.unique(obs[0, :, 10:], axis=0)) == 8
    tags = jax.jit(VectorEnv(Toy(), 8).reset)(jax.random.key(7), None)[0]["tag"]
    assert len(np.unique(tags)) == 8


def test_wrappers_pass_on_what_they_do_not_change():
    env = TMaze(9, 3)
    stack = VectorEnv(AutoReset(EpisodeStatistics(env)), 5)
    for wrapped in (stack, pickle.loads(pickle.dumps(stack))):  # spawned workers pickle
        assert (wrapped.num_envs, wrapped.num_distractors, wrapped.default_params) == (5, 3, (9, 1000))
        assert wrapped.observation_space(wrapped.default_params) == env.observation_space(env.default_params)
        assert wrapped.action_space(wrapped.default_params) == env.action_space(env.default_params)
        with pytest.raises(AttributeError, match="no_such_name"):
            wrapped.no_such_name  # noqa: B018


@pytest.mark.parametrize("env", [VectorEnv(AutoReset(Toy()), 3), OptimisticReset(Toy(), 3, 3)])
def test_without_a_pool_there_is_nothing_to_refresh(env):
    _, state = env.reset(jax.random.key(8), None)
    assert env.refresh(jax.random.key(9), state, None) is state


def test_episode_statistics_name_their_outcomes():
    """Return and length are metrics, too, besides those of the environment."""
    outcomes = VectorEnv(AutoReset(EpisodeStatistics(TMaze())), 2).outcomes
    names = {"charts/episodic_return": "episodic_return", "charts/episodic_length": "episodic_length"}
    assert outcomes == names | {"charts/success_rate": "success"}


# EpisodeNoise.


@cache
def noisy(scale: float):
    return VectorEnv(AutoReset(EpisodeNoise(EpisodeStatistics(TMaze()), scale)), 32)


def noise_of(scale: float, seed: int):
    """A rollout with random actions -> noise (201, 32, 4), the rest of the observation, whether an episode begins."""
    actions = np.random.default_rng(0).choice(4, (200, 32))
    out = rollout(noisy(scale), EnvParams(2, 7), jax.random.key(seed), actions)
    first_obs, obs, _, _, done, _ = jax.tree.map(np.asarray, out)
    obs = np.concatenate([first_obs[None], obs])
    return obs[..., :4], obs[..., 4:], np.concatenate([np.ones((1, 32), bool), done])


def test_noise_lasts_an_episode():
    """It is the same in all steps of an episode, and no other episode, environment or seed has it."""
    noise, obs, begins = noise_of(0.7, seed=21)
    assert noise.shape == (201, 32, 4) and noise.dtype == np.float32
    np.testing.assert_array_equal((noise[1:] != noise[:-1]).any(-1), begins[1:])
    other, _, other_begins = noise_of(0.7, seed=22)
    drawn = np.concatenate([noise[begins], other[other_begins]])
    assert len(np.unique(drawn, axis=0)) == len(drawn) > 2000


def test_noise_is_normal_and_independent():
    """It has mean 0 and standard deviation `scale`. The four numbers, consecutive episodes, neighbours and cues are
    independent."""
    noise, obs, begins = noise_of(0.7, seed=23)
    drawn, cue = noise[begins] / 0.7, 2 * obs[begins][:, 0] - 1
    for product in (drawn, drawn**2 - 1, drawn[:, :3] * drawn[:, 1:], drawn * cue[:, None]):
        assert abs(product.mean()) < 5 / np.sqrt(product.size) * max(product.std(), 1)
    in_order = np.stack([noise[:, b][begins[:, b]][:12] / 0.7 for b in range(32)])  # (32, 12, 4)
    for product in (in_order[:, 1:] * in_order[:, :-1], in_order[1:] * in_order[:-1]):
        assert abs(product.mean()) < 5 / np.sqrt(product.size)
    assert not noise_of(0.0, seed=23)[0].any()


def test_noise_leaves_the_rest_alone():
    """The inner environment's inputs and outputs are those without noise; the space includes the noise."""
    env, plain, params = noisy(0.7), EpisodeStatistics(TMaze()), EnvParams(3, 9)
    key, reset_key, step_key = jax.random.split(jax.random.key(24), 3)
    obs, state = env.env.env.reset(reset_key, params)
    expected_obs, expected_state = plain.reset(jax.random.split(reset_key)[1], params)
    assert_trees_equal((obs[4:], state.env_state), (expected_obs, expected_state))
    obs, state, *rest = env.env.env.step(step_key, state, jnp.int32(3), params)
    expected_obs, expected_state, *expected_rest = plain.step(step_key, expected_state, jnp.int32(3), params)
    assert_trees_equal((obs[4:], state.env_state, rest), (expected_obs, expected_state, expected_rest))
    space = env.observation_space(params)
    assert space.shape == (20,) and space.contains(np.asarray(obs)) and not space.contains(np.full(20, 1e3, np.float32))


# TimeAwareObservation.


def test_steps_left():
    """The first number counts down from the limit; at 0 the episode has ended, and a new one has all its steps left."""
    inner, params = EpisodeStatistics(TMaze()), EnvParams(3, 9)
    env = VectorEnv(AutoReset(TimeAwareObservation(inner)), 16)
    actions = np.random.default_rng(0).choice(4, (60, 16), p=[0.05, 0.05, 0.2, 0.7])
    first_obs, obs, state, reward, done, info = rollout(env, params, jax.random.key(27), actions)
    plain = rollout(VectorEnv(AutoReset(inner), 16), params, jax.random.key(27), actions)
    assert_trees_equal((first_obs[..., 1:], obs[..., 1:], state, reward, done, info), plain)
    left = np.concatenate([first_obs[None], obs])[..., 0]
    assert (left[0] == 9).all() and set(left[1:][done]) == {9.0} and left.min() == 1
    np.testing.assert_array_equal((left[:-1] - left[1:])[~done], 1)
    np.testing.assert_array_equal(left[:-1][info["truncated"]], 1)
    space = env.observation_space(params)
    assert space.shape == (17,) and space.contains(np.asarray(obs[0, 0])) and space.high[0] == 9


def test_what_is_observed_is_what_a_step_returns():
    """observe, which PooledReset calls, adds the noise and the steps left, too."""
    inner = TMaze(5)
    inner.observe = lambda state, params: jnp.arange(16.0) + state.position
    env = EpisodeNoise(TimeAwareObservation(EpisodeStatistics(inner)), 0.7)
    first_obs, state = env.reset(jax.random.key(28), env.default_params)
    observed = env.observe(state, env.default_params)
    np.testing.assert_array_equal(observed, np.concatenate([first_obs[:5], np.arange(16.0)]))
    obs, state, *_ = env.step(jax.random.key(29), state, jnp.int32(3), env.default_params)
    observed = env.observe(state, env.default_params)
    np.testing.assert_array_equal(observed, np.concatenate([obs[:5], np.arange(16.0) + 1]))


# What is drawn.


@pytest.mark.parametrize("wrap", [
    lambda env, n: VectorEnv(AutoReset(EpisodeStatistics(env)), n),
    lambda env, n: VectorEnv(AutoReset(EpisodeNoise(TimeAwareObservation(EpisodeStatistics(env)), 0.7)), n),
    lambda env, n: OptimisticReset(EpisodeStatistics(env), n, n),
    lambda env, n: PooledReset(EpisodeStatistics(env), n, 2),
])  # fmt: skip
def test_a_stack_draws_its_first_environment(wrap):
    inner = TMaze(5)
    inner.observe = lambda state, params: jnp.zeros(16)  # PooledReset calls it; its value does not matter here
    env = wrap(inner, 3)
    params = env.default_params
    _, state = env.reset(jax.random.key(25), params)
    _, state, *_ = env.step(jax.random.key(26), state, jnp.array([3, 0, 0]), params)
    probabilities = np.array([0.1, 0.2, 0.3, 0.4])
    image = env.render(state, params, 3, probabilities, -0.1)
    first = jax.tree.map(lambda x: x[0], state)
    while not hasattr(first, "cue"):
        first = first.env_state
    np.testing.assert_array_equal(image, inner.render(first, params, 3, probabilities, -0.1))
    assert first.position == 1


def test_a_video_is_one_episode(tmp_path):
    """The policy is called once per step, with its last memory, and with a reset only at the beginning. Each step has
    its own key. The episode is not one that a script with the same seed begins with."""
    env = VectorEnv(AutoReset(EpisodeStatistics(TMaze(2, max_episode_steps=7))), 1)
    seen, reset_keys, step_keys, reset, step = [], [], [], env.reset, env.step

    def note(keys, key):
        jax.debug.callback(lambda words: keys.append(words.tolist()), jax.random.key_data(key))

    env.reset = lambda key, params: note(reset_keys, key) or reset(key, params)
    env.step = lambda key, *inputs: note(step_keys, key) or step(key, *inputs)

    def policy(obs, reset, memory):
        assert obs.shape == (1, 1, 16) and reset.shape == (1, 1)
        jax.debug.callback(lambda *x: seen.append(tuple(map(int, x))), reset[0, 0], memory, ordered=True)
        return 1e3 * (jnp.arange(4) == RIGHT)[None, None], jnp.zeros((1, 1)), memory + 1

    path = tmp_path / "episode.gif"
    record_video(env, policy, jnp.int32(0), 1, path)
    jax.effects_barrier()
    of_training = jax.random.key_data(jax.random.split(jax.random.key(1), 100)).tolist()
    assert len(reset_keys) == 1 and reset_keys[0] not in of_training
    assert len({tuple(words) for words in step_keys}) == 7
    assert seen == [(t == 0, t) for t in range(7)], "it walks to the junction, and then into the wall until the limit"
    with Image.open(path) as video:
        assert video.n_frames <= 7 and min(video.size) > 100  # equal images become one that lasts longer


# PooledReset.


def pooled(num_envs: int = 5, pool_size: int = 3):
    return PooledReset(EpisodeStatistics(Toy()), num_envs, pool_size)


@partial(quick_jit, static_argnums=0)
def pooled_steps(env, key, state, noise):
    """noise: (T,), only its length matters -> last state, then obs, state, reward, done, info, each (T, B, ...)."""

    def step(state, key):
        obs, state, reward, done, info = env.step(key, state, jnp.zeros(env.num_envs), None)
        return state, (obs, state, reward, done, info)

    return jax.lax.scan(step, state, jax.random.split(key, len(noise)))


def episodes_of(tags, done) -> list[list[int]]:
    """tags of the episodes that steps belong to, and done, (T, B) -> for each environment the episodes it finished."""
    return [[int(tag) for tag in tags[done[:, i], i]] for i in range(tags.shape[1])]


def test_pool_is_used_in_order_and_again_from_its_beginning():
    env = pooled()
    obs, first = quick_jit(env.reset)(jax.random.key(10), None)
    pool = np.asarray(first.pool.env_state.tag)  # (5, 3)
    assert len(np.unique(pool)) == 15  # each environment has its own, and every draw is new
    np.testing.assert_array_equal(obs["tag"], pool[:, 0])
    _, (obs, state, reward, done, info) = pooled_steps(env, jax.random.key(11), first, np.zeros(60))
    obs, done, info = jax.tree.map(np.asarray, (obs, done, info))
    for i, tags in enumerate(episodes_of(info["tag"], done)):
        assert len(tags) > 6
        assert tags == [pool[i, k % 3] for k in range(len(tags))]
    np.testing.assert_array_equal(state.used, 1 + np.cumsum(done, axis=0))
    # With done, the observation is the first of the next episode; each observation is that of its state.
    assert not obs["time"][done].any() and obs["time"][~done].all()
    np.testing.assert_array_equal(obs["tag"], state.env_state.env_state.tag)
    np.testing.assert_array_equal(obs["time"], state.env_state.env_state.clock["time"])


def test_pooled_statistics_are_those_of_auto_reset():
    """They begin again with each episode; reward, done and info are those of the last step."""
    env = pooled()
    _, first = env.reset(jax.random.key(12), None)
    _, (_, state, reward, done, info) = pooled_steps(env, jax.random.key(13), first, np.zeros(60))
    lengths = np.asarray(info["tag"] % 4 + 1)
    np.testing.assert_array_equal(info["episodic_length"][done], lengths[done])
    np.testing.assert_allclose(info["episodic_return"][done], [float("1" * n) for n in lengths[done]])
    np.testing.assert_allclose(reward, 10.0 ** (info["episodic_length"] - 1), rtol=1e-6)
    np.testing.assert_array_equal(done, info["episodic_length"] == lengths)
    statistics = state.env_state
    assert not statistics.episodic_return[done].any() and not statistics.episodic_length[done].any()
    assert statistics.episodic_length[~done].all()
    assert len(np.unique(info["noise"])) == done.size  # each step of each environment has its own key


def test_refresh_draws_a_new_pool_and_leaves_episodes_alone():
    env = pooled()
    _, first = env.reset(jax.random.key(14), None)
    before, _ = pooled_steps(env, jax.random.key(15), first, np.zeros(6))
    after = quick_jit(env.refresh)(jax.random.key(16), before, None)
    assert_trees_equal(after.env_state, before.env_state)
    assert not after.used.any()
    pools = [np.asarray(state.pool.env_state.tag) for state in (before, after)]
    assert len(np.unique(pools)) == 30
    other = env.refresh(jax.random.key(17), before, None).pool.env_state.tag
    assert not np.isin(other, pools).any()

    _, (_, _, _, done, info) = pooled_steps(env, jax.random.key(18), after, np.zeros(12))
    for i, tags in enumerate(episodes_of(np.asarray(info["tag"]), np.asarray(done))):
        running = int(before.env_state.env_state.tag[i])
        assert tags == [running, *(pools[1][i, k % 3] for k in range(len(tags) - 1))]


def test_pooled_state_has_the_environments_as_leading_axis():
    """So that it can be sharded over devices."""
    env = pooled(num_envs=5, pool_size=3)
    _, state = env.reset(jax.random.key(19), None)
    assert all(x.shape[0] == 5 for x in jax.tree.leaves(state))
    assert all(x.shape[1] == 3 for x in jax.tree.leaves(state.pool))


def test_pool_sizes_that_cannot_work():
    with pytest.raises(ValueError, match="^pool_size 0: must be at least 1$"):
        pooled(pool_size=0)


def test_mystery_path_in_a_pool():
    """In the whole stack, an observation is the image of its state, and each episode has the path from the pool."""
    env = PooledReset(EpisodeStatistics(MysteryPath()), 3, 2)
    params = env.default_params._replace(max_episode_steps=4)
    reset, step = quick_jit(env.reset), quick_jit(env.step)
    obs, state = reset(jax.random.key(20), params)
    for t in range(12):
        obs, state, _, done, info = step(jax.random.key(t), state, jnp.full(3, t % 4), params)
        assert done.all() == (t % 4 == 3) and (info["truncated"] == done).all()
        assert (info["episodic_length"] == t % 4 + 1).all()
        episode = state.env_state.env_state
        route = jax.tree.map(lambda x: x[:, (t + 1) // 4 % 2], state.pool.env_state.route)  # noqa: B023
        assert_trees_equal(episode.route, route)
        np.testing.assert_array_equal(obs, jax.vmap(env.unwrapped.observe, (0, None))(episode, params))


# OptimisticReset.


@pytest.mark.parametrize("num_envs, reset_ratio", [(12, 1), (12, 3), (12, 12), (1, 1), (24, 3), (18, 3)])
def test_optimistic_reset(num_envs, reset_ratio):
    """Each environment that ends gets a fresh start, not shared as long as its group has enough."""
    env = OptimisticReset(EpisodeStatistics(Toy()), num_envs, reset_ratio)
    assert (env.num_envs, env.num_fresh) == (num_envs, num_envs // reset_ratio)
    out = rollout(env, None, jax.random.key(8), np.tile(np.arange(num_envs), (100, 1)))
    first_obs, obs, state, reward, done, info = jax.tree.map(np.asarray, out)
    assert len(set(first_obs["tag"])) == num_envs
    fresh = math.gcd(env.num_fresh, 4)  # first states of a group
    tag, time, surplus, drawn = first_obs["tag"], first_obs["time"], set(), list(first_obs["tag"])
    for t in range(100):
        # The step is that of the episode that was running,
        np.testing.assert_array_equal(info["tag"][t], tag)
        np.testing.assert_array_equal(info["action"][t], np.arange(num_envs))
        np.testing.assert_allclose(reward[t], 10.0**time, rtol=1e-6)
        np.testing.assert_array_equal(done[t], time + 1 > tag % 4)
        np.testing.assert_array_equal(info["episodic_length"][t], time + 1)
        # which continues, or is followed by a new one, in observation and state alike.
        time = np.where(done[t], 0, time + 1)
        np.testing.assert_array_equal(obs["tag"][t][~done[t]], tag[~done[t]])
        tag = obs["tag"][t]
        for found, expected in ((obs["time"], time), (state.env_state.tag, tag), (state.episodic_length, time)):
            np.testing.assert_array_equal(found[t], expected)
        groups = (x.reshape(-1, fresh * reset_ratio) for x in (done[t], tag))
        for ended, tags in zip(*groups, strict=True):
            new, shared_by = np.unique(tags[ended], return_counts=True)
            assert len(new) == min(ended.sum(), fresh)
            if len(new):
                assert shared_by.max() == -(-ended.sum() // fresh)
            surplus.add(np.sign(int(ended.sum()) - fresh))
            drawn.extend(new)
    assert len(set(drawn)) == len(drawn) > 20 // reset_ratio  # new ones in every step
    # Otherwise the loop would cover less than it should: fewer ends than fresh starts, as many, and more.
    assert reset_ratio != 3 or surplus == {-1, 0, 1}
    assert all(len(set(noise)) == num_envs for noise in info["noise"])  # each steps with its own key
    assert not np.isin(drawn, info["noise"]).any()  # and starts use other keys than steps


def test_optimistic_reset_is_a_vector_env():
    env = OptimisticReset(EpisodeStatistics(TMaze(9, 3)), 6, 2)
    for wrapped in (env, pickle.loads(pickle.dumps(env))):
        assert (wrapped.num_envs, wrapped.num_distractors, wrapped.default_params) == (6, 3, (9, 1000))
        assert wrapped.unwrapped is wrapped.env.env
    _, state = jax.eval_shape(env.reset, jax.random.key(0), env.default_params)
    assert {x.shape[0] for x in jax.tree.leaves(state)} == {6}


@pytest.mark.parametrize("num_envs, reset_ratio", [(10, 4), (4, 16), (4, 0)])
def test_optimistic_reset_of_sizes_that_cannot_work(num_envs, reset_ratio):
    with pytest.raises(ValueError, match=f"^optimistic_reset_ratio {reset_ratio}: must divide num_envs {num_envs}"):
        OptimisticReset(TMaze(), num_envs, reset_ratio)
