"""Mystery Path against recordings of Memory Gym (tests/record_mysterypath.py); its paths and frames."""

import re
import sys
import zlib
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import brisk_jit, quick_jit, small_args
from common import load as import_script

from envs import mysterypath
from envs.mysterypath import ENVIRONMENTS, FORWARD, NOOP, TURN_RIGHT, Draws, MysteryPath, Route, find_path, sample_draws

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.mysterypath_oracle import Seen, imitate, oracle  # noqa: E402

IDS = list(ENVIRONMENTS)
FIXTURES = Path(__file__).parent / "fixtures"


@cache
def load(name: str) -> dict:
    with np.load(FIXTURES / f"{name}.npz") as file:
        return dict(file)


def recorded_draws(z: dict) -> Draws:
    """The draws of a fixture in find_path's format, with a leading axis; what it does not need is -1."""
    border = (z["border_choice"] + 0.5) / z["border_choices"]  # the middle of the interval of this choice
    whole = [z[name].astype(np.int32) for name in ("origin", "ends", "walls", "wall_count", "noise")]
    return Draws(*whole[:4], border.astype(np.float32), whole[4])


def tile(xy: np.ndarray) -> np.ndarray:
    return (7 * xy[..., 0] + xy[..., 1]).astype(np.int32)


def episodes(z: dict):
    """-> for each recorded episode its number, its slice of the data per step, its slice of the images."""
    ends = np.cumsum(z["length"], dtype=int)
    for i, (end, length) in enumerate(zip(ends, z["length"], strict=True)):
        yield i, slice(end - length, end), slice(end - length + i, end + i + 1)


find_paths = quick_jit(jax.vmap(find_path))


# Memory Gym's recordings.


@pytest.mark.parametrize("name", ["mysterypath_generator", *IDS])
def test_same_draws_give_the_same_path(name):
    z = load(name)
    assert len(z["path"]) >= (1000 if "generator" in name else 100)
    route = find_paths(recorded_draws(z))
    np.testing.assert_array_equal(route.start, tile(z["start"]))
    np.testing.assert_array_equal(route.goal, tile(z["goal"]))
    np.testing.assert_array_equal(np.reshape(route.path, (-1, 7, 7)), z["path"])


@partial(jax.jit, static_argnums=0)
def replay(env, params, route, actions):
    """route (E, ...), actions (E, T) -> images (E, T + 1, ...), reward, done, truncated, success (E, T)."""

    def episode(route, actions):
        first = env.begin(route)

        def step(state, action):
            obs, state, reward, done, info = env.step(None, state, action, params)
            return state, (obs, reward, done, info["truncated"], info["success"])

        _, (obs, *rest) = jax.lax.scan(step, first, actions)
        return jnp.concatenate([env.observe(first, params)[None], obs]), *rest

    return jax.vmap(episode)(route, actions)


@pytest.mark.parametrize("env_id", IDS)
def test_episodes_equal_memory_gym(env_id):
    """Every pixel, reward and end is the same."""
    z, env = load(env_id), MysteryPath(env_id)
    limit = 128 if "Grid" in env_id else 512
    assert env.default_params.max_episode_steps == limit
    actions = np.zeros((len(z["length"]), limit), np.int32)
    for i, steps, _ in episodes(z):
        actions[i, : z["length"][i]] = z["action"][steps]
    route = Route(tile(z["start"]), tile(z["goal"]), z["path"].reshape(-1, 49))

    batch = 15  # episodes at a time, so that their images fit into memory
    assert len(actions) % batch == 0
    for i, steps, images in episodes(z):
        if i % batch == 0:
            part = jax.tree.map(lambda x: x[i : i + batch], (route, actions))  # noqa: B023
            out = [np.asarray(x) for x in replay(env, env.default_params, *part)]
        n = z["length"][i]
        obs, reward, done, truncated, success = (x[i % batch] for x in out)
        if images.stop <= len(z["pictures"]):
            np.testing.assert_array_equal(obs[: n + 1], z["pictures"][images])
        assert [zlib.crc32(image) for image in obs[: n + 1]] == z["crc"][images].tolist()
        np.testing.assert_array_equal(reward[:n], z["reward"][steps])
        np.testing.assert_array_equal(done[:n], z["done"][steps])
        assert success[n - 1] == z["success"][i] and not success[: n - 1].any()
        assert truncated[n - 1] == (not z["success"][i]) and not truncated[: n - 1].any()
    assert (obs.dtype, reward.dtype) == (np.uint8, np.float32)
    assert done.dtype == truncated.dtype == success.dtype == bool


@pytest.mark.parametrize("env_id", IDS)
def test_recordings_hold_every_event(env_id):
    """Otherwise the comparison above would cover less than it should."""
    z, grid = load(env_id), "Grid" in env_id
    last = (128 if grid else 512) == z["length"]
    events = {
        "fall": z["fell"].sum(),
        "wall": z["bumped"].sum(),
        "success": z["success"].sum(),
        "time limit": (~z["success"]).sum(),
        "success in the last step": (last & z["success"]).sum(),
        "goal": (z["reward"] == 1).sum(),
    }
    rotations = range(0, 8, 2) if grid else range(8)
    events |= {f"rotation {r}": (z["rotation"] == r).sum() for r in rotations}
    events |= {f"action {a}": (z["action"] == a).sum() for a in range(4 if grid else 9)}
    if env_id != "MysteryPath-Grid-v0":  # which rewards only the goal
        events["progress"] = (z["reward"] == np.float32(0.1)).sum()
    assert min(events.values()) >= 10, events
    assert last[~z["success"]].all()
    assert {*np.unique(z["start"]), *np.unique(z["goal"])} == set(range(7))
    first = z["pictures"][0]
    for channel, xy in ((2, z["start"][0]), (1, z["goal"][0])):  # blue and green tiles, if they are shown
        x, y = 12 * xy + 11  # a corner that the agent does not cover
        assert (first[x, y] == np.eye(3)[channel] * 255 * ("Easy" in env_id)).all()


# Paths drawn from a key.

NUM_PATHS = 10_000


@cache
def drawn_paths() -> tuple[Draws, Route]:
    draws = quick_jit(jax.vmap(sample_draws))(jax.random.split(jax.random.key(0), NUM_PATHS))
    return jax.tree.map(np.asarray, (draws, find_paths(draws)))


def test_draws_have_the_ranges_of_memory_gym():
    draws, _ = drawn_paths()
    for name, low, high in (("origin", 0, 4), ("ends", 0, 7), ("walls", 0, 100), ("wall_count", 0, 2), ("noise", 1, 9)):
        values = getattr(draws, name)
        counts = np.bincount(values.ravel() - low)
        expected = values.size / (high - low)
        assert values.min() == low and len(counts) == high - low
        assert chi_square_p(((counts - expected) ** 2 / expected).sum(), len(counts) - 1) > 0.01, name
        assert len(np.unique(values.reshape(NUM_PATHS, -1), axis=0)) == min(NUM_PATHS, (high - low) ** values[0].size)
    assert (draws.border >= 0).all() and (draws.border < 1).all()


def chi_square_p(statistic: float, degrees: int) -> float:
    return float(jax.scipy.special.gammaincc(degrees / 2, statistic / 2))


def two_sample_p(ours, theirs) -> float:
    """Chance of counts that differ as much, if both have the same distribution. Cells with few counts are merged."""
    few = ours + theirs < 20
    a, b = (np.append(counts[~few], counts[few].sum()).astype(float) for counts in (ours, theirs))
    a, b = a[a + b > 0], b[a + b > 0]
    x, y = np.sqrt(b.sum() / a.sum()), np.sqrt(a.sum() / b.sum())
    return chi_square_p(((x * a - y * b) ** 2 / (a + b)).sum(), len(a) - 1)


def test_paths_are_distributed_as_memory_gyms():
    z, (_, route) = load("mysterypath_generator"), drawn_paths()
    lengths = route.path.sum(1)
    assert z["lengths"].sum() == NUM_PATHS
    assert two_sample_p(np.bincount(lengths, minlength=50), z["lengths"]) > 0.01
    # Each tile's share of the paths; 49 tiles are tested at once.
    ours, theirs = route.path.sum(0), z["tiles"].ravel()
    share = (ours + theirs) / (2 * NUM_PATHS)
    assert (np.abs(ours - theirs) < 4 * np.sqrt(2 * NUM_PATHS * share * (1 - share))).all()


def test_paths_lead_from_start_to_the_opposite_border():
    _, route = drawn_paths()
    (x, y), (goal_x, goal_y) = (np.divmod(end, 7) for end in (route.start, route.goal))
    opposite = (np.abs(x - goal_x) == 6) & (x % 6 == 0) | (np.abs(y - goal_y) == 6) & (y % 6 == 0)
    assert opposite.all()
    path = np.pad(route.path.reshape(-1, 7, 7), ((0, 0), (1, 1), (1, 1)))
    inner = path[:, 1:-1, 1:-1]
    reached = np.zeros_like(path)
    reached[np.arange(NUM_PATHS), x + 1, y + 1] = True
    for _ in range(inner.sum((1, 2)).max()):  # spreads over the path, one tile further each time
        near = reached[:, 2:, 1:-1] | reached[:, :-2, 1:-1] | reached[:, 1:-1, 2:] | reached[:, 1:-1, :-2]
        reached[:, 1:-1, 1:-1] |= near & inner
    np.testing.assert_array_equal(reached, path)
    assert route.path[np.arange(NUM_PATHS), route.goal].all()


# The interface.


@pytest.mark.parametrize("env_id", ["MysteryPath", "MysteryPath-Grid-Easy-v1", ""])
def test_unknown_environments(env_id):
    with pytest.raises(ValueError, match=f"^env_id {re.escape(env_id)}: ") as error:
        MysteryPath(env_id)
    assert all(known in str(error.value) for known in IDS)


def test_environments_are_the_published_ones():
    """Time limits are Memory Gym's; only Easy variants show start and goal; the plain grid rewards no progress."""
    assert ENVIRONMENTS == {
        "MysteryPath-Grid-Easy-v0": (128, 0.1, True, True),
        "MysteryPath-Easy-v0": (512, 0.1, True, True),
        "MysteryPath-Grid-v0": (128, 0.0, False, False),
        "MysteryPath-v0": (512, 0.1, False, False),
    }


@pytest.mark.parametrize("env_id", IDS)
def test_spaces(env_id):
    env = MysteryPath(env_id)
    params = env.default_params
    space = env.observation_space(params)
    assert env.action_space(params).n == (4 if "Grid" in env_id else 9)
    assert (space.shape, space.dtype) == ((84, 84, 3), np.uint8)
    assert (space.low == 0).all() and (space.high == 255).all()
    assert space.contains(np.asarray(quick_jit(env.reset)(jax.random.key(0), params)[0]))


@pytest.mark.parametrize("env_id", ["MysteryPath-Grid-Easy-v0", "MysteryPath-v0"])
def test_jit_and_vmap_change_nothing(env_id):
    """Calls of one environment equal one scan of a batch."""
    env = MysteryPath(env_id)
    params, keys = env.default_params, jax.random.split(jax.random.key(1), 2)
    batch_obs, batch = quick_jit(jax.vmap(env.reset, (0, None)))(keys, params)
    actions = np.random.default_rng(0).integers(4, size=(2, 6))
    images, *rest = quick_jit(replay.__wrapped__, static_argnums=0)(env, params, batch.route, actions)
    np.testing.assert_array_equal(batch_obs, images[:, 0])
    assert not np.array_equal(batch_obs[0], batch_obs[1])
    reset, step = quick_jit(env.reset), quick_jit(env.step)
    for i in range(2):
        obs, state = reset(keys[i], params)
        np.testing.assert_array_equal(obs, images[i, 0])
        for t in range(6):
            obs, state, reward, done, info = step(None, state, actions[i, t], params)
            single = (obs, reward, done, info["truncated"], info["success"])
            for a, b in zip(single, (images[:, 1:], *rest), strict=True):
                np.testing.assert_array_equal(a, b[i, t])
    shapes = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert shapes(state) == shapes(reset(keys[0], params)[1])  # as scan needs it


def test_each_key_has_an_episode_of_its_own():
    """The same key gives the same episode; nothing is left of an earlier one."""
    env = MysteryPath()
    reset = quick_jit(jax.vmap(env.reset, (0, None)))
    keys = jax.random.split(jax.random.key(2), 64)
    obs, state = reset(keys, env.default_params)
    again, _ = reset(keys, env.default_params)
    np.testing.assert_array_equal(obs, again)
    assert len(np.unique(state.route.path, axis=0)) > 50
    assert not state.met.any() and not state.off_path.any() and not state.time.any() and not state.rotation.any()


# Frames. The areas are named by what they show, (left, top, right, bottom).
PATH, VIEW, POLICY = (20, 44, 188, 212), (208, 44, 376, 212), (400, 40, 640, 215)
OUTCOME = (470, 0, 640, 38)


def straight_path(env, steps: int = 0):
    """-> state after `steps` steps of an episode whose path goes straight down in column 2."""
    path = np.zeros((7, 7), bool)
    path[2] = True
    state = env.begin(Route(jnp.int32(14), jnp.int32(20), jnp.asarray(path.ravel())))
    for action in [TURN_RIGHT] * 2 + [FORWARD] * steps if steps else []:
        state = STEP(None, state, action, env.default_params)[1]
    return state


ENV = MysteryPath()
STEP = quick_jit(ENV.step)


def differ(a, b, area) -> bool:
    return a.crop(area).tobytes() != b.crop(area).tobytes()


def count(image, colour: str, area) -> int:
    """-> the number of pixels of the area that have the colour, up to smoothing."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(np.asarray(image.crop(area)).astype(int) - rgb).max(-1) <= 8).sum())


def frame(state, **shown):
    return ENV.render(state, ENV.default_params, **shown)


def test_frames_show_the_path_and_the_agents_view():
    image = frame(straight_path(ENV), action=FORWARD, probabilities=np.full(4, 0.25), reward=0.1)
    assert (image.mode, image.size) == ("RGB", (640, 240))
    # Five tiles of 24 x 24 between start and goal, upright: down is down, in the path and in the view.
    assert count(image, mysterypath.PATH, (68, 68, 92, 188)) >= 5 * 20**2
    assert count(image, mysterypath.GOAL, (68, 188, 92, 212)) > 20**2
    assert count(image, "#00ff00", (256, 188, 280, 212)) == 24**2
    assert count(image, "#0000ff", (256, 44, 280, 68)) > 100


def test_frames_show_the_agent_move_and_the_tiles_met():
    states = [straight_path(ENV, steps) for steps in (1, 2)]
    images = [frame(state) for state in states]
    assert differ(*images, PATH) and differ(*images, VIEW)
    shaded = [count(image, mysterypath.MET, PATH) for image in images]
    assert 0 < shaded[0] < shaded[1]
    turned = frame(STEP(None, states[0], TURN_RIGHT, ENV.default_params)[1])
    assert differ(images[0], turned, PATH) and differ(images[0], turned, VIEW)


def test_frames_show_the_policy_and_the_action():
    state = straight_path(ENV)
    where = []
    for i in range(4):
        image = frame(state, action=i, probabilities=np.eye(4)[i])
        rows = [count(image, mysterypath.AGENT, (400, y, 640, y + 1)) for y in range(44, 212)]
        where.append(np.argmax(rows))
    assert where == sorted(where) and where[0] + 50 < where[3]  # from top to bottom
    continuous = MysteryPath("MysteryPath-v0")
    names = [continuous.render(state, continuous.default_params, i, np.full(9, 1 / 9)) for i in range(9)]
    assert all(differ(names[i], names[j], POLICY) for i in range(9) for j in range(i))


@pytest.mark.parametrize(
    "steps, time, action, colour",
    [
        (5, 7, FORWARD, "GOOD"),
        (5, 127, FORWARD, "GOOD"),
        (5, 127, NOOP, "INK"),
        (5, 126, NOOP, None),
        (0, 0, NOOP, None),
    ],
)
def test_frames_show_how_an_episode_ends(steps, time, action, colour):
    image = frame(straight_path(ENV, steps)._replace(time=jnp.int32(time)), action=action)
    found = {name for name in ("GOOD", "BAD", "INK") if count(image, getattr(mysterypath, name), OUTCOME)}
    assert found == ({colour} if colour else set())


def test_frames_show_a_fall():
    falling = straight_path(ENV, 1)
    falling = STEP(None, falling, TURN_RIGHT, ENV.default_params)[1]  # looks left
    assert count(frame(falling, action=FORWARD), mysterypath.BAD, OUTCOME)
    fallen = STEP(None, falling, FORWARD, ENV.default_params)[1]
    image = frame(fallen, action=FORWARD)
    assert count(image, mysterypath.BAD, PATH) and count(image, "#ff0000", VIEW)
    assert not count(image, mysterypath.BAD, OUTCOME)  # this action only brings it back


# The oracle of benchmarks/mysterypath_oracle.py.


def test_oracle_needs_no_second_fall_on_a_tile():
    """It reaches the goal in all episodes and falls on each tile at most once: it remembers what it has seen."""
    params = ENV.default_params
    play_step = quick_jit(lambda seen, state: ENV.step(None, state, oracle(seen, state), params))
    for seed in range(5):
        state = quick_jit(ENV.reset)(jax.random.key(seed), params)[1]
        seen, falls, done = Seen.nothing().with_tile_of(state), [], False
        while not done:
            _, state, _, done, info = play_step(seen, state)
            seen = seen.with_tile_of(state)
            x, y = state.position // mysterypath.TILE
            falls += [(int(x), int(y))] if state.off_path else []
        assert info["success"] and len(falls) == len(set(falls)) == seen.beside.sum()
        assert not (seen.beside & state.route.path).any() and not (seen.path & ~state.route.path).any()


@pytest.mark.slow
def test_agent_learns_to_imitate_the_oracle(monkeypatch):
    """Ten updates reduce the cross-entropy from that of four equal actions, log 4 = 1.39; their steps add up."""
    monkeypatch.setattr(jax, "jit", brisk_jit)
    script = import_script("ppo_agalite_mysterypath")
    args = small_args(script, num_envs=16, num_minibatches=4, num_steps=32, total_timesteps=5120, learning_rate=3e-3)
    steps, cross_entropy, returns, success = zip(*imitate(script, args), strict=True)
    assert steps == tuple(range(512, 5121, 512)) and np.isfinite([*cross_entropy, *returns, *success]).all()
    assert cross_entropy[-1] < 1.2 < cross_entropy[0]
