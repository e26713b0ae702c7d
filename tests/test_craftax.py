"""Craftax against its package; packed observations, ends of episodes, achievements and frames."""

import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import load, quick_jit, small_args

from envs import craftax
from envs.craftax import GAMES, Craftax, pack

FULL, CLASSIC = GAMES
unpack = jax.jit(craftax.unpack)
ENVS = {env_id: Craftax(env_id) for env_id in GAMES}


def package(env_id, name):
    return importlib.import_module(f"{GAMES[env_id].module}.{name}")


@cache
def functions(env_id):
    """-> our reset and step, the package's reset and step.

    For Classic, each is compiled separately. Craftax takes too long for that: ours are not compiled, and call the
    package's compiled ones.
    """
    env = Craftax(env_id)
    theirs = quick_jit(env.package_env.reset), quick_jit(env.package_env.step)
    if env_id == CLASSIC:
        return quick_jit(env.reset), quick_jit(env.step), *theirs
    env.package_env.reset, env.package_env.step = theirs
    return env.reset, env.step, *theirs


def start(env_id, seed=0):
    return functions(env_id)[0](jax.random.key(seed), ENVS[env_id].default_params)


def step(env_id, state, action="noop", seed=1, **params):
    env = ENVS[env_id]
    params = env.default_params.replace(**params)
    return functions(env_id)[1](jax.random.key(seed), state, jnp.int32(env.action_names.index(action)), params)


def same_bits(a, b):
    """Asserts equal bit patterns, so that no rounding, -0 or NaN can hide."""
    np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


def busy_actions(env_id, num_steps):
    """Random actions of all kinds, but mostly walks of several steps, and "do"."""
    names = ENVS[env_id].action_names
    rng = np.random.default_rng(0)
    walks = rng.choice([names.index(name) for name in ("left", "right", "up", "down")], num_steps // 4 + 1)
    actions = np.where(rng.random(num_steps) < 0.5, np.repeat(walks, 4)[:num_steps], names.index("do"))
    return np.where(rng.random(num_steps) < 0.2, rng.integers(len(names), size=num_steps), actions)


@pytest.mark.slow
@pytest.mark.parametrize("env_id, num_steps", [(CLASSIC, 600), (FULL, 300)])
def test_episodes_equal_the_package(env_id, num_steps):
    """Observations, states, rewards and ends equal the package's in every bit, over several worlds."""
    reset, step, their_reset, their_step = functions(env_id)
    params, key, endings, worlds = ENVS[env_id].default_params, jax.random.key(0), 0, 1
    key, reset_key = jax.random.split(key)
    (obs, state), (their_obs, their_state) = reset(reset_key, params), their_reset(reset_key, params)
    same_bits(unpack(obs), their_obs)
    for t, action in enumerate(busy_actions(env_id, num_steps)):
        key, step_key, reset_key = jax.random.split(key, 3)
        obs, state, reward, done, info = step(step_key, state, action, params)
        their_obs, their_state, their_reward, their_done, _ = their_step(step_key, their_state, action, params)
        same_bits(unpack(obs), their_obs)
        same_bits(reward, their_reward)
        assert bool(done) == bool(their_done) and not info["truncated"]
        np.testing.assert_array_equal(info["achievements"], their_state.achievements)
        endings += int(done)
        if done or t % 150 == 149:
            (obs, state), (their_obs, their_state) = reset(reset_key, params), their_reset(reset_key, params)
            same_bits(unpack(obs), their_obs)
            worlds += 1
    assert worlds > 2
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(their_state), strict=True):
        assert (ours == theirs).all()


@pytest.mark.slow
def test_observations_on_all_floors():
    """Observations equal the package's on each floor: lit or dark, by day or night, awake or asleep, near creatures."""
    observe = quick_jit(ENVS[FULL].package_env.get_obs)
    rng, dark, lit, light, asleep = np.random.default_rng(5), 0, 0, set(), set()
    for seed in range(2):
        _, world = start(FULL, seed)
        world = world.replace(timestep=jnp.int32(200 * seed), player_energy=jnp.int32(3))
        for floor in range(9):
            position = np.clip(world.up_ladders[floor] + rng.integers(-9, 10, 2, np.int32), 0, 47)
            state = world.replace(player_level=jnp.int32(floor), player_position=position)
            for t, action in enumerate(("left", "do", "down", "do", "sleep", "noop")):
                obs, state, *_ = step(FULL, state, action, seed=t)
                obs, expected = np.asarray(unpack(obs)), np.asarray(observe(state))
                same_bits(obs, expected)
                is_lit = obs[: GAMES[FULL].num_bits].reshape(GAMES[FULL].view)[..., -1]
                dark, lit = dark + (is_lit == 0).any(), lit + (is_lit == 1).all()
                light.add(float(obs[-8]))
                asleep.add(float(obs[-7]))
    assert dark > 20 and lit > 10 and min(light) < 0.2 and max(light) > 0.8 and asleep == {0.0, 1.0}


@pytest.mark.parametrize("env_id", GAMES)
def test_any_state_at_all_survives_packing(env_id):
    """Packing preserves observations of random states, with every block, item and creature; the map is 0 or 1."""
    env, game, rng = ENVS[env_id], GAMES[env_id], np.random.default_rng(1)
    like = jax.eval_shape(env.package_env.reset, jax.random.key(0), env.default_params)[1]
    highest = {".map": 36 if env_id == FULL else 16, ".item_map": 4, ".player_level": 8, ".player_position": 47}

    def noise(path, x):
        name, shape = jax.tree_util.keystr(path), (200, *x.shape)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), 200)
        if x.dtype == bool:
            return rng.random(shape) < 0.5
        if x.dtype == jnp.float32:
            return (rng.normal(size=shape) * (rng.random(shape) < 0.5)).astype(np.float32)
        return rng.integers(0, highest.get(name, 47 if name.endswith("position") else 7) + 1, shape, np.int32)

    state = jax.tree_util.tree_map_with_path(noise, like)
    near = state.player_position[:, None] + rng.integers(-4, 5, (200, 3, 2))  # creatures in sight
    if env_id == FULL:
        for name in ("melee_mobs", "passive_mobs", "mob_projectiles", "player_projectiles", "ranged_mobs"):
            mobs = getattr(state, name)
            position = np.broadcast_to(near[:, None, : mobs.position.shape[2]], mobs.position.shape)
            state = state.replace(**{name: mobs.replace(position=position)})
    else:
        for name in ("zombies", "cows", "skeletons", "arrows"):
            mobs = getattr(state, name)
            state = state.replace(**{name: mobs.replace(position=near[:, : mobs.position.shape[1]])})
    obs = quick_jit(jax.vmap(env.package_env.get_obs))(state)
    view = np.asarray(obs)[:, : game.num_bits].reshape(-1, *game.view)
    assert set(np.unique(view)) == {0.0, 1.0}
    assert view.max((0, 1, 2)).all() and not view.min((0, 1, 2)).any()  # each channel varies
    same_bits(unpack(pack(obs)), obs)


@pytest.mark.parametrize("env_id, obs_size, packed_size", [(FULL, 8268, 1232), (CLASSIC, 1345, 254)])
def test_sizes(env_id, obs_size, packed_size):
    """Observations have the package's size, packed or not, with any leading axes, also inside jit."""
    env, game = ENVS[env_id], GAMES[env_id]
    params = env.default_params
    assert env.package_env.observation_space(params).shape == (obs_size,) == (game.obs_size,)
    assert package(env_id, "envs.craftax_symbolic_env").get_map_obs_shape() == game.view
    space = env.observation_space(params)
    assert (space.shape, space.dtype) == ((packed_size,), np.uint8)
    assert space.contains(np.asarray(start(env_id)[0]))
    assert env.action_space(params).n == len(env.action_names) == {FULL: 43, CLASSIC: 17}[env_id]
    obs = np.zeros((2, 3, obs_size), np.float32)
    obs[..., : game.num_bits] = np.random.default_rng(2).integers(2, size=(2, 3, game.num_bits))
    obs[..., game.num_bits :] = np.random.default_rng(3).normal(size=(2, 3, game.num_numbers))
    packed = pack(obs)
    assert (packed.shape, packed.dtype) == ((2, 3, packed_size), np.uint8)
    same_bits(unpack(packed), obs)
    same_bits(jax.jit(jax.vmap(unpack))(jax.jit(pack)(obs)), obs)


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, np.nan])
def test_a_map_that_does_not_fit_one_bit_is_not_packed_silently(value):
    obs = np.zeros((2, 1345), np.float32)
    obs[0, 7] = value
    unpacked = np.asarray(unpack(pack(obs)))
    assert np.isnan(unpacked[0, 1323:]).all() and not np.isnan(unpacked[1]).any()


def test_what_is_no_observation():
    with pytest.raises(ValueError, match="^an observation of 16 numbers"):
        pack(jnp.zeros(16))
    with pytest.raises(ValueError, match="^a packed observation of 8268 bytes"):
        unpack(jnp.zeros(8268, jnp.uint8))


def test_unknown_env_id():
    sentence = "env_id Craftax-Pixels-v1: there are Craftax-Symbolic-v1 and Craftax-Classic-Symbolic-v1"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        Craftax("Craftax-Pixels-v1")


@pytest.mark.parametrize("env_id", GAMES)
def test_time_limit_and_death(env_id):
    """Only the limit truncates; death, lava and victory do not, not even in the last step."""
    _, state = start(env_id)
    limit = ENVS[env_id].default_params.max_timesteps
    assert limit == {FULL: 100000, CLASSIC: 10000}[env_id]
    dead = {"player_health": jnp.zeros_like(state.player_health)}
    ends = {"death": dead}
    if env_id == FULL:
        ends["victory"] = {"boss_progress": jnp.int32(8)}
    else:
        ends["lava"] = {"map": jnp.full_like(state.map, package(CLASSIC, "constants").BlockType.LAVA.value)}
    for time, at_limit in ((0, False), (limit - 2, False), (limit - 1, True)):
        timed = state.replace(timestep=jnp.int32(time))
        *_, done, info = step(env_id, timed)
        assert (bool(done), bool(info["truncated"])) == (at_limit, at_limit)
        for name, change in ends.items():
            *_, done, info = step(env_id, timed.replace(**change))
            assert bool(done) and not info["truncated"], name
    *_, done, info = step(env_id, state, max_timesteps=1)  # params are not constants
    assert done and info["truncated"]


@pytest.mark.parametrize("env_id", GAMES)
def test_achievements_have_the_package_s_names(env_id):
    env, common = ENVS[env_id], package(env_id, "envs.common")
    info_of = common.log_achievements_to_info if env_id == FULL else common.compute_score
    _, state = start(env_id)
    unlocked = np.random.default_rng(4).random(len(env.achievements)) < 0.5
    info = info_of(state.replace(achievements=unlocked), True)
    expected = {name.removeprefix("Achievements/"): x > 0 for name, x in info.items() if name.startswith("Ach")}
    assert dict(zip(env.achievements, unlocked, strict=True)) == expected
    assert len(expected) == {FULL: 67, CLASSIC: 22}[env_id]


def test_the_largest_return():
    """It is the sum of all achievements, each once."""
    assert ENVS[FULL].max_return == package(FULL, "constants").ACHIEVEMENT_REWARD_MAP.sum() == 226
    assert ENVS[CLASSIC].max_return == len(package(CLASSIC, "constants").Achievement) == 22


def test_unlocking_an_achievement():
    """Placing a table is rewarded once, and the achievement stays unlocked in later steps."""
    env = ENVS[CLASSIC]
    _, state = start(CLASSIC)
    grass = jnp.full_like(state.map, package(CLASSIC, "constants").BlockType.GRASS.value)
    state = state.replace(map=grass, inventory=state.inventory.replace(wood=jnp.int32(9)))
    unlocked = lambda info: {name for name, x in zip(env.achievements, info["achievements"], strict=True) if x}
    _, state, reward, _, info = step(CLASSIC, state)
    assert (reward, unlocked(info)) == (0, set())
    _, state, reward, done, info = step(CLASSIC, state, "place_table")
    assert (reward, bool(done), unlocked(info)) == (1, False, {"place_table"})
    for action in ("left", "place_table"):
        _, state, reward, _, info = step(CLASSIC, state, action)
        assert (reward, unlocked(info)) == (0, {"place_table"})


@pytest.mark.slow
def test_in_the_stack():
    """The script's environment works under vmap, jit and scan: ends, statistics and resets are right, and each reset
    makes another world."""
    script = load("ppo_agalite_craftax")
    env = script.make_env(small_args(script, env_id=CLASSIC), 8)
    params = env.default_params.replace(max_timesteps=12)
    assert (env.num_envs, env.max_return, len(env.achievements)) == (8, 22, 22)

    @quick_jit
    def play(key):
        first_obs, state = env.reset(key, params)
        first = state.env_state.replace(timestep=jnp.arange(8, dtype=jnp.int32))  # so that they end one after another
        step = lambda state, key: (lambda out: (out[1], out))(env.step(key, state, jnp.zeros(8, int), params))
        return first_obs, *jax.lax.scan(step, state._replace(env_state=first), jax.random.split(key, 12))[1]

    first_obs, obs, state, reward, done, info = play(jax.random.key(5))
    assert (first_obs.shape, obs.shape, obs.dtype) == ((8, 254), (12, 8, 254), np.uint8)
    assert (reward.dtype, done.dtype, info["achievements"].shape) == (np.float32, bool, (12, 8, 22))
    np.testing.assert_array_equal(np.argwhere(done[4:]), [(7 - i, i) for i in range(7, -1, -1)])
    np.testing.assert_array_equal(info["truncated"], done)
    np.testing.assert_array_equal(info["episodic_length"][done], np.arange(5, 13))
    worlds = np.asarray(state.env_state.map)[-1].reshape(8, -1)
    assert len(np.unique(worlds, axis=0)) == 8


@pytest.mark.parametrize("env_id", GAMES)
def test_states_are_of_one_type(env_id):
    """reset and step return the same types, also weak ones; otherwise the second update would be compiled again."""
    env = ENVS[env_id]
    obs, state = jax.eval_shape(env.reset, jax.random.key(0), env.default_params)
    action = jax.eval_shape(lambda: jnp.int32(0))
    next_obs, next_state, *_ = jax.eval_shape(env.step, jax.random.key(0), state, action, env.default_params)
    kind = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    assert kind((obs, state)) == kind((next_obs, next_state))


def test_importing_the_package_is_left_to_the_first_use():
    """Before the first use, jax.distributed can still start. If that use is inside jit, no tracer is left behind."""
    script = """
import sys, jax
from envs.craftax import Craftax
env = Craftax("Craftax-Classic-Symbolic-v1")
env.observation_space(None)
assert not any(name.partition(".")[0] == "craftax" for name in sys.modules)
jax.jit(lambda: env.default_params and env.achievements and 0)()
modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "craftax"]
assert modules and not any(isinstance(x, jax.core.Tracer) for module in modules for x in vars(module).values())
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.slow
def test_frames(capsys):
    """Frames have one size, show action, policy and reward, and leave no file in the package."""
    env, assets = ENVS[CLASSIC], Path(package(CLASSIC, "constants").__file__).parent / "assets"
    _, state = start(CLASSIC)
    before = sorted(assets.iterdir())
    shown = dict(action=jnp.int32(7), probabilities=jax.nn.softmax(jnp.arange(17.0)), reward=jnp.float32(1))
    frame = env.render(state, env.default_params, **shown)
    assert (frame.mode, frame.size) == ("RGB", (576, 288))
    assert sorted(assets.iterdir()) == before and not capsys.readouterr().out
    differ = lambda a, b, left, right: (
        a.crop((left, 0, right, 288)).tobytes() != b.crop((left, 0, right, 288)).tobytes()
    )
    for name in shown:
        without = env.render(state, env.default_params, **shown | {name: None})
        assert differ(frame, without, 288, 576) and not differ(frame, without, 0, 288)
    moved = env.render(step(CLASSIC, state, "down")[1], env.default_params, **shown)
    assert differ(frame, moved, 0, 288)
