"""What the tests share: names of scripts, small arguments, random parameters, float64 tools."""

import contextlib
import dataclasses
import functools
import importlib
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from PIL import Image

from envs.craftax import GAMES, pack


def scripts_of(task: str) -> list[str]:
    """The names of all scripts of a task, a user's copies included."""
    return sorted(path.stem for path in Path(__file__).parents[1].glob(f"ppo_*_{task}.py"))


TMAZE, MYSTERYPATH, CRAFTAX, MEMORYMAZE = map(scripts_of, ("tmaze", "mysterypath", "craftax", "memorymaze"))
SCRIPTS = TMAZE + MYSTERYPATH + CRAFTAX  # for Memory Maze see test_memorymaze_scripts.py
# Left out of slow tests that hardly depend on the memory: scripts whose memory and environment others test, and GaLiTe
# and the GRU, which are like AGaLiTe and the LSTM there.
LIKE_OTHERS = "ppo_gtrxl_mysterypath", "ppo_gtrxl_craftax", "ppo_galite_tmaze", "ppo_gru_tmaze"
FEW = [name for name in SCRIPTS if name not in LIKE_OTHERS]
QUICK = [name for name in FEW if name not in MYSTERYPATH]  # for `-m "not slow"`
FIRST = ["ppo_agalite_tmaze"]  # for tests of code that is the same in all (test_sync.py), whatever the model


def slow_but(all_of_them, quick) -> list:
    """Parameters of a test: `-m "not slow"` leaves out those not in `quick`."""
    slow = lambda x: pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=pytest.mark.slow)
    return [x if x in quick else slow(x) for x in all_of_them]


# Small and all different, so that no test can confuse two axes. Each script takes the fields that it has.
SMALL = {
    "corridor_len": 2, "num_distractors": 3, "max_episode_steps": 7, "logit_noise": 0.7,
    "num_layers": 2, "d_model": 12, "d_head": 5, "d_ffc": 10, "num_heads": 2, "eta": 3, "r": 4, "memory_len": 5,
    "hidden_size": 11, "optimistic_reset_ratio": 4,
    "d_encoder": 13, "num_channels": 4, "d_actor": 9, "d_critic": 11,
    "num_envs": 8, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2, "total_timesteps": 1280,
    "gamma": 0.8,  # so that the few steps left until the time limit matter
}  # fmt: skip
# For tests of the code around the model: quick to compile.
TINY = SMALL | {
    "num_layers": 1, "d_model": 6, "d_head": 3, "d_ffc": 6, "num_heads": 1, "eta": 2, "r": 2, "d_actor": 4,
    "d_critic": 4, "d_encoder": 3, "num_channels": 1,
}  # fmt: skip


def quick_compiler_options(level: int = 0) -> dict:
    """Options with which XLA compiles several times as fast for a CPU, to slower code; none if it lacks them."""
    options = {"xla_backend_optimization_level": level, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(np.float32(0)).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options if jax.default_backend() == "cpu" else {}


# jit for functions that are called once or twice: only their compilation takes time.
quick_jit = functools.partial(jax.jit, compiler_options=quick_compiler_options())
# jit for functions that are called about a hundred times: compiles twice as fast as usual, to code nearly as fast.
brisk_jit = functools.partial(jax.jit, compiler_options=quick_compiler_options(1))


def load(name: str):
    """The script as a module."""
    return importlib.import_module(name)


def small_args(script, sizes=SMALL, **changes):
    """Small arguments of the script, which must have the fields in `changes`."""
    fields = {field.name for field in dataclasses.fields(script.Args)}
    return script.Args(**{name: value for name, value in sizes.items() if name in fields} | changes)


tiny_args = functools.partial(small_args, sizes=TINY)


CLASSIC = GAMES["Craftax-Classic-Symbolic-v1"]


def noise_observation(key, shape=()):
    """Random observations like those of Craftax Classic, (*shape, 254) uint8: binary symbols, and numbers."""
    keys = jax.random.split(key)
    symbols = jax.random.bernoulli(keys[0], 0.1, (*shape, CLASSIC.num_bits)).astype(jnp.float32)
    return pack(jnp.concatenate([symbols, jax.random.normal(keys[1], (*shape, CLASSIC.num_numbers))], axis=-1))


class StandInParams(NamedTuple):
    max_episode_steps: int


class StandInState(NamedTuple):
    time: jax.Array  # () int32
    achievements: jax.Array  # (2,) bool
    world: jax.Array  # WORLD float32, as large as the game's state, see tests/devices.py


WORLD = 61, 67


class CraftaxStandIn:
    """Replaces Craftax Classic, which takes long to compile: observations are noise, an action may unlock one of two
    achievements, and episodes end by chance or at the time limit."""

    achievements = ("collect_wood", "eat_cow")
    max_return = 2.0

    def __init__(self, env_id: str):
        self.default_params = StandInParams(40)

    def action_space(self, params):
        return spaces.Discrete(4)

    def observation_space(self, params):
        return spaces.Box(0, 255, (CLASSIC.packed_size,), np.uint8)

    def reset(self, key, params):
        world = jax.random.uniform(key, WORLD)
        return noise_observation(key), StandInState(jnp.zeros((), jnp.int32), jnp.zeros(2, bool), world)

    def step(self, key, state, action, params):
        obs_key, end_key = jax.random.split(key)
        new = (jnp.arange(2) == action) & ~state.achievements
        state = StandInState(state.time + 1, state.achievements | new, state.world)
        dead = jax.random.bernoulli(end_key, 0.03)
        truncated = ~dead & (state.time >= params.max_episode_steps)
        info = {"truncated": truncated, "achievements": state.achievements}
        return noise_observation(obs_key), state, new.sum().astype(jnp.float32), dead | truncated, info

    def render(self, state, params, action, probabilities, reward):
        return Image.new("RGB", (8, 8), (5 * int(state.time), 0, 0))


def make_env(script, args, num_envs: int, **options):
    """The script's environment; for Craftax, with a stand-in for the game."""
    stand_in = mock.patch.object(script, "Craftax", CraftaxStandIn) if hasattr(script, "Craftax") else None
    with stand_in or contextlib.nullcontext():
        return script.make_env(args, num_envs, **options)


def build(script, args):
    """-> env, agent, as main makes them. If no flag sets the time limit, it is that of SMALL."""
    env = make_env(script, args, args.num_envs)
    if not hasattr(args, "max_episode_steps"):
        env.unwrapped.default_params = env.default_params._replace(max_episode_steps=SMALL["max_episode_steps"])
    return env, script.ActorCritic(args, env.action_space(env.default_params).n)


def bind(script, args):
    """-> init(key), update(runner), not jitted."""
    env, agent = build(script, args)
    return functools.partial(script.init, args, env, agent), functools.partial(script.update, args, env)


def seed_keys(args):
    """The keys of all seeds of a run, as main makes them."""
    return jax.vmap(jax.random.key)(args.seed + jnp.arange(args.num_seeds))


def with_params(runner, params):
    """The same runner with other parameters."""
    return runner._replace(train_state=runner.train_state.replace(params=params))


def arrays_of(runner):
    """The same runner without its functions, which differ between calls of `init`, so that two can be compared."""
    return runner._replace(train_state=runner.train_state.replace(apply_fn=None, tx=None))


def log_prob_of(logits, action):
    """log softmax(logits)[action]"""
    return np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(action)[..., None], -1)[..., 0]


def stagger(runner):
    """The same runner with its environments at different times, so that episodes end at different steps."""

    def shift(path, x):
        is_time = getattr(path[-1], "name", "") == "time" and x.ndim == 1  # (B,); a pool of first states is (B, K)
        return jnp.arange(len(x), dtype=x.dtype) % 5 if is_time else x

    return runner._replace(env_state=jax.tree_util.tree_map_with_path(shift, runner.env_state))


def random_observations(env, seed: int, shape: tuple[int, ...]):
    """Random numbers of the scale of observations, (*shape, ...) float32; for Craftax, packed ones."""
    if isinstance(env.unwrapped, CraftaxStandIn):
        return np.array(noise_observation(jax.random.key(seed), shape))
    space, rng = env.observation_space(env.default_params), np.random.default_rng(seed)
    scale = 1.0 if space.dtype == np.float32 else 25.0  # a tenth of a byte's range, see random_params
    obs = scale * rng.normal(size=(*shape, *space.shape))
    if space.dtype == np.float32:  # the steps left until the time limit are a large positive number
        counts = np.isfinite(space.high) & (space.high > 1)
        obs = np.where(counts, rng.uniform(0, np.where(counts, space.high, 1), obs.shape), obs)
    return np.float32(obs)


def random_tmaze_observations(rng, shape: tuple[int, ...]):
    """-> noise for the logits, steps left until the time limit, and nine other numbers, (*shape, 14) float32"""
    parts = rng.normal(size=(*shape, 4)), rng.uniform(0, 7, (*shape, 1)), rng.normal(size=(*shape, 9))
    return np.concatenate(parts, axis=-1).astype(np.float32)


def random_params(params, seed: int = 0):
    """Random parameters of the same shapes: gates half open, activations and logits of order 1, no zeros.

    At initialisation, most of a model is nearly switched off, so a test of it would miss much.
    """
    rng = np.random.default_rng(seed)

    def random(path, x):
        noise = rng.normal(size=x.shape)
        if x.ndim >= 2:
            inputs = x.shape[0] if x.shape[-2] == 5 and x.ndim == 3 else x.shape[-2]  # (..., in, out), or (in, 5, out)
            noise *= 1.6 / np.sqrt(inputs)
            if x.shape[-2] == 192:  # inputs of the first convolution's kernel
                noise *= 10  # images are mostly black
        else:
            noise = 0.5 * noise + (path[-1].key == "scale")  # a bias, or the scale of a LayerNorm
        return jnp.asarray(noise, x.dtype)

    return jax.tree_util.tree_map_with_path(random, params)


def float64(tree):
    """The same numbers as numpy arrays, with floats in double precision."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None), tree)


def deviation(ours, expected) -> float:
    """max|ours - expected| / max|expected|, of the worst leaf."""
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    ours, expected = jax.tree.leaves(float64(ours)), jax.tree.leaves(float64(expected))
    assert [x.shape for x in ours] == [x.shape for x in expected]
    assert all(np.isfinite(x).all() for x in ours + expected)
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, expected, strict=True))


def count_parameters(script, args) -> int:
    """The number of parameters of the agent."""
    env, agent = build(script, args)
    obs, _ = jax.eval_shape(env.reset, jax.random.key(0), env.default_params)
    obs, reset = jnp.zeros((1, *obs.shape), obs.dtype), jnp.ones((1, args.num_envs), bool)
    start = obs, reset, agent.initial_memory(args.num_envs)
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(agent.init, jax.random.key(0), *start)))


def authors_gate(g, name: str) -> dict:
    """A gate of the authors in our names. g(name) finds their arrays, `name` is their name of the gate."""
    kernels = {ours: g(f"{name}/{ours}/kernel") for ours in ("Wr", "Wz", "Wg", "Ur", "Uz", "Ug")}
    return kernels | {"bias": g(f"{name}/bgp")}


def check_golden(net, params, memory_0, z):
    """Values, in one call and in two, and input gradients must equal the authors' -> our final memory."""
    x, reset, cotangent = z["inputs"][:, None], z["terminations"][:, None], z["cotangent"][:, None]
    split = int(z["split"])
    expected_shapes = jax.eval_shape(net.init, jax.random.key(0), x, reset, memory_0)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected_shapes), "the test's mapping is wrong"

    apply = quick_jit(net.apply)
    outputs, memory = apply(params, x, reset, memory_0)
    first, handed_over = apply(params, x[:split], reset[:split], memory_0)
    second, _ = apply(params, x[split:], reset[split:], handed_over)
    assert 0 < split < len(x)
    assert deviation(outputs[:, 0], z["outputs"]) <= 5e-6
    assert deviation(np.concatenate([first, second])[:, 0], z["outputs_two_calls"]) <= 5e-6
    with jax.enable_x64(True):  # their float32 gradient takes half of the bound
        params, x, memory_0 = jax.tree.map(jnp.asarray, float64((params, x, memory_0)))
        gradient = quick_jit(jax.grad(lambda x: (net.apply(params, x, reset, memory_0)[0] * cotangent).sum()))(x)
        assert gradient.dtype == jnp.float64
        assert deviation(np.asarray(gradient)[:, 0], z["input_gradient"]) <= 5e-6
    return memory


def assert_close(ours, expected, atol: float):
    """Same structure and shapes, and no difference larger than atol."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(data(a), data(b), rtol=0, atol=atol), ours, expected)


def assert_identical(ours, expected):
    """Same structure, and the same bits."""
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(data(a), data(b)), ours, expected)


def data(x):
    """The words of a PRNG key; anything else unchanged."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
