"""The T-Maze against a plain Python reference, and its frames."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import quick_jit
from tmaze_reference import DOWN, LEFT, RIGHT, UP, Reference

from envs import tmaze
from envs.tmaze import EnvParams, EnvState, TMaze

ENV = TMaze()


@partial(quick_jit, static_argnums=0)
def rollout(env, params, key, actions):
    """actions (B, T) -> obs (B, T + 1, ...) with the first, reward, done, truncated, success (B, T)."""

    def episode(key, actions):
        reset_key, step_key = jax.random.split(key)
        first_obs, state = env.reset(reset_key, params)

        def step(state, key_action):
            key, action = key_action
            obs, state, reward, done, info = env.step(key, state, action, params)
            return state, (obs, reward, done, info["truncated"], info["success"])

        _, (obs, *rest) = jax.lax.scan(step, state, (jax.random.split(step_key, len(actions)), actions))
        return jnp.concatenate([first_obs[None], obs]), *rest

    return jax.vmap(episode)(jax.random.split(key, len(actions)), actions)


def cue_shown(first_obs) -> str:
    return {(0, 1): "up", (1, 0): "down"}[tuple(int(bit) for bit in first_obs[:2])]


def action_sequences(corridor_len: int, limit: int) -> np.ndarray:
    """-> (B, limit): random walks, walks that seek the junction, and plans that test the limits of each rule."""
    rng = np.random.default_rng(corridor_len)
    walks = [rng.choice(4, (8, limit), p=p) for p in ([0.25] * 4, [0.03, 0.03, 0.04, 0.9], [0.05, 0.05, 0.3, 0.6])]
    walk = [RIGHT] * (corridor_len - 1)
    plans = [[LEFT] * limit, [RIGHT] * limit, [*walk[:-1], UP, DOWN, RIGHT, LEFT, LEFT, RIGHT, UP]]
    for turn in (UP, DOWN):
        plans += [walk + [turn]]
        plans += [[LEFT] * (limit - wait - corridor_len) + walk + [turn] for wait in (0, 1)]  # turns at the last steps
    # Each plan four times, so that it meets both cues; what follows a plan's end does not matter.
    plans = [(plan + [UP] * limit)[:limit] for plan in plans for _ in range(4)]
    return np.concatenate([*walks, plans]).astype(np.int32)


@pytest.mark.parametrize("corridor_len", [2, 7, 160, 256])
def test_episodes_equal_the_reference(corridor_len):
    params = TMaze(corridor_len).default_params
    assert params == (corridor_len, 1000)
    actions = action_sequences(corridor_len, limit=1000)
    obs, reward, done, truncated, success = map(np.asarray, rollout(ENV, params, jax.random.key(0), actions))
    assert (obs.dtype, reward.dtype) == (np.float32, np.float32)
    assert done.dtype == truncated.dtype == success.dtype == bool

    endings = set()
    for i in range(len(actions)):
        reference = Reference(corridor_len, 1000, cue_shown(obs[i, 0]))
        steps = [reference.step(actions[i, 0])]
        while not steps[-1][2]:
            steps.append(reference.step(actions[i, len(steps)]))
        n = len(steps)
        expected = [np.array(column) for column in zip(*steps, strict=True)]
        np.testing.assert_array_equal(obs[i, 0], reference.first_obs + [0] * 6)
        np.testing.assert_array_equal(obs[i, 1 : n + 1, :10], expected[0])
        np.testing.assert_array_equal(reward[i, :n], expected[1].astype(np.float32))
        np.testing.assert_array_equal(done[i, :n], expected[2])
        np.testing.assert_array_equal(truncated[i, :n], expected[3])
        np.testing.assert_array_equal(success[i, :n], expected[4])
        assert np.isin(obs[i, 1 : n + 1, 10:], (0, 1)).all()
        endings.add((reference.cue, bool(success[i, n - 1]), bool(truncated[i, n - 1])))
    # Otherwise the comparison above would cover less than it should: both cues with every kind of end.
    assert endings == {(cue, *end) for cue in ("up", "down") for end in ((True, False), (False, False), (False, True))}


@pytest.mark.parametrize("turn", [UP, DOWN])
def test_time_limit(turn):
    """999 steps do not end an episode, 1000 do. A turn in the last step ends it without truncation."""
    late = [LEFT] * 840 + [RIGHT] * 159
    actions = np.array([late + [turn]] * 8 + [late + [LEFT]] * 8 + [late[1:] + [LEFT, turn]] * 8)
    _, reward, done, truncated, success = map(
        np.asarray, rollout(ENV, EnvParams(160, 1000), jax.random.key(1), actions)
    )
    assert not done[:, :999].any() and done[:16, 999].all()
    assert not truncated[:8].any() and truncated[8:16, 999].all()
    assert set(reward[:8, 999]) == {4.0, -1.0} and (reward[8:16, 999] == np.float32(-0.1)).all()
    np.testing.assert_array_equal(success[:8, 999], reward[:8, 999] == 4.0)
    assert not success[8:16].any()


def test_cue_is_a_fair_coin():
    n = 4096
    reset = jax.jit(jax.vmap(ENV.reset, (0, None)))
    obs, state = reset(jax.random.split(jax.random.key(2), n), ENV.default_params)
    ups = sum(cue_shown(first_obs) == "up" for first_obs in np.asarray(obs))
    assert abs(ups - n / 2) < 5 * np.sqrt(n) / 2
    assert set(np.asarray(state.cue)) == {0, 1}


def test_distractors_are_fair_and_independent_coins():
    """Independent of each other, of neighbouring steps and environments, and of the cue, which they could give away."""
    actions = np.full((64, 200), LEFT)
    obs = np.asarray(rollout(ENV, ENV.default_params, jax.random.key(3), actions)[0])
    assert (obs[:, 0, 10:] == 0).all()
    coins = 2 * obs[:, 1:, 10:] - 1  # (64, 200, 6) of -1 and +1, so that a mean product is a correlation
    cue = np.sign(obs[:, 0, 0] - 0.5)[:, None, None]
    products = {"step": coins[:, 1:] * coins[:, :-1], "environment": coins[1:] * coins[:-1], "cue": coins * cue}
    products |= {"coin": coins} | {f"bit +{k}": coins * np.roll(coins, k, axis=2) for k in (1, 2, 3)}
    products |= {f"coin {k}": coins[..., k] for k in range(6)} | {
        f"cue, coin {k}": (coins * cue)[..., k] for k in range(6)
    }
    for name, product in products.items():
        assert abs(product.mean()) < 5 / np.sqrt(product.size), name


def test_jit_and_vmap_change_nothing():
    """The plain functions, with Python parameters, equal those under jit, vmap and scan."""
    actions = np.array([[RIGHT, UP, RIGHT, LEFT, RIGHT, RIGHT, DOWN]] * 2)
    key, params = jax.random.key(4), EnvParams(4, 9)
    batch = rollout(ENV, params, key, actions)
    for i, episode_key in enumerate(jax.random.split(key, 2)):
        reset_key, steps_key = jax.random.split(episode_key)
        obs, state = ENV.reset(reset_key, params)
        np.testing.assert_array_equal(obs, batch[0][i, 0])
        for t, step_key in enumerate(jax.random.split(steps_key, 7)):
            obs, state, reward, done, info = ENV.step(step_key, state, actions[i, t], params)
            single = (obs, reward, done, info["truncated"], info["success"])
            for a, b in zip(single, (batch[0][:, 1:], *batch[1:]), strict=True):
                np.testing.assert_array_equal(a, b[i, t])
    assert bool(done)


@pytest.mark.parametrize("num_distractors", [0, 6, 11])
def test_spaces(num_distractors):
    env = TMaze(5, num_distractors)
    params = env.default_params
    space = env.observation_space(params)
    assert env.action_space(params).n == 4
    assert space.shape == (10 + num_distractors,)
    assert (space.low == 0).all() and (space.high == 1).all()
    all_obs = np.asarray(rollout(env, params, jax.random.key(5), np.array([[UP, DOWN, LEFT, RIGHT] * 5]))[0][0])
    assert all(space.contains(obs) for obs in all_obs)
    assert (all_obs[1:, 10:].min(0) == 0).all() and (all_obs[1:, 10:].max(0) == 1).all()  # each bit varies


@pytest.mark.parametrize(
    "sizes, sentence",
    [
        ({"corridor_len": 1}, "corridor_len 1: the cue would be in sight at the junction, so at least 2"),
        ({"corridor_len": 257}, "corridor_len 257: the position is an 8-bit Gray code, so at most 256"),
        ({"num_distractors": -1}, "num_distractors -1: a number of observation bits, so at least 0"),
        ({"max_episode_steps": 2**31}, "max_episode_steps 2147483648: counted in 32 bits, so at most 2147483647"),
        ({"max_episode_steps": 159}, "max_episode_steps 159: to walk the corridor and turn takes at least 160"),
    ],
)
def test_sizes_that_cannot_work(sizes, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        TMaze(**sizes)


def test_the_shortest_time_limit_is_enough():
    params = TMaze(160, max_episode_steps=160).default_params
    _, _, done, truncated, _ = rollout(ENV, params, jax.random.key(6), np.array([[RIGHT] * 159 + [UP]]))
    assert done[0, 159] and not truncated.any()


# Frames. The areas are named by what they show, (left, top, right, bottom).
CUE_CARD, CORRIDOR, POLICY, OVERVIEW = (0, 60, 125, 185), (125, 40, 455, 185), (470, 40, 640, 180), (0, 190, 640, 222)
OUTCOME = (470, 0, 640, 38)


def frame(position, cue, time, corridor_len=160, **shown):
    return ENV.render(EnvState(position, cue, time), EnvParams(corridor_len, 1000), **shown)


def differ(a, b, area) -> bool:
    return a.crop(area).tobytes() != b.crop(area).tobytes()


def where(image, colour: str, area) -> np.ndarray:
    """-> (N, 2) rows and columns, within the area, of the pixels that have the colour exactly."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.argwhere((np.asarray(image.crop(area)) == rgb).all(-1))


def test_frames_of_an_episode():
    """They need only the states, actions and probabilities that a training script has, and have one size."""
    params = TMaze(5).default_params
    _, state = ENV.reset(jax.random.key(7), params)
    step = jax.jit(ENV.step)
    for action in jnp.array([RIGHT, RIGHT, UP, LEFT, RIGHT, RIGHT, RIGHT, DOWN]):
        _, next_state, reward, _, _ = step(jax.random.key(8), state, action, params)
        image = ENV.render(state, params, action, jax.nn.softmax(jnp.arange(4.0)), reward)
        assert (image.mode, image.size) == ("RGB", (640, 240))
        state = next_state


@pytest.mark.parametrize("corridor_len, position", [(2, 0), (7, 5), (160, 0), (160, 80), (256, 1), (256, 254)])
def test_frames_show_the_agent_move(corridor_len, position):
    before, after = (frame(position + i, 0, 300, corridor_len) for i in (0, 1))
    assert differ(before, after, CORRIDOR) and differ(before, after, OVERVIEW)
    assert not differ(before, after, CUE_CARD)


def test_frames_show_the_cue_brightly_at_the_first_step_only():
    assert differ(frame(0, 0, 0), frame(0, 1, 0), CUE_CARD)
    for cue in (0, 1):
        rows = where(frame(0, cue, 0), tmaze.CUE, (30, 70, 90, 140))[:, 0]  # inside the card: only the arrow
        widths = np.unique(rows, return_counts=True)[1]
        assert (widths[0] < widths[-1]) == (cue == 0)  # its tip is its narrow end
        assert len(where(frame(0, cue, 1), tmaze.CUE, (0, 0, 640, 240))) == 0
    assert differ(frame(0, 0, 1), frame(0, 1, 1), CUE_CARD)  # for the spectator


def test_frames_show_the_right_arm_once_the_junction_is_near():
    assert differ(frame(155, 0, 200), frame(155, 1, 200), CORRIDOR)
    assert not differ(frame(80, 0, 200), frame(80, 1, 200), CORRIDOR)


def test_frames_show_the_policy_and_the_action():
    heights = [where(frame(80, 0, 200, action=i, probabilities=np.eye(4)[i]), tmaze.AGENT, POLICY) for i in range(4)]
    means = [pixels[:, 0].mean() for pixels in heights]
    assert means == sorted(means) and means[0] + 50 < means[3]  # up, down, left, right from top to bottom
    half, full = (
        where(frame(80, 0, 200, action=0, probabilities=p), tmaze.AGENT, POLICY)
        for p in ([0.5, 0.5, 0, 0], [1, 0, 0, 0])
    )
    assert 0.4 < len(half) / len(full) < 0.7
    images = [frame(80, 0, 200, action=i) for i in range(4)]
    assert all(differ(images[i], images[j], CORRIDOR) for i in range(4) for j in range(i))


@pytest.mark.parametrize(
    "position, cue, time, action, colour",
    [
        (159, 0, 200, UP, "GOOD"),
        (159, 1, 200, DOWN, "GOOD"),
        (159, 0, 200, DOWN, "BAD"),
        (159, 1, 999, UP, "BAD"),
        (159, 0, 999, LEFT, "INK"),
        (80, 0, 999, UP, "INK"),
        (159, 0, 998, RIGHT, None),
        (158, 0, 200, UP, None),
    ],
)
def test_frames_show_how_an_episode_ends(position, cue, time, action, colour):
    image = frame(position, cue, time, action=action)
    found = {name for name in ("GOOD", "BAD", "INK") if len(where(image, getattr(tmaze, name), OUTCOME))}
    assert found == ({colour} if colour else set())
    if colour in ("GOOD", "BAD"):  # the arrow into the arm that was taken
        rows = where(image, getattr(tmaze, colour), CORRIDOR)[:, 0]
        assert len(rows) and (rows.mean() < 64) == (action == UP)
