"""Memory Maze against its package; seeds, ends of episodes, frames, and what it says if it cannot run."""

import dataclasses
import functools
import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import jax
import numpy as np
import pytest
from common import load, quick_jit, slow_but, small_args
from compare_memorymaze import check, record
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from PIL import Image

from envs import memorymaze
from envs.memorymaze import (
    ACTIONS,
    MAX_STEPS,
    MazeFactory,
    MemoryMaze,
    MissingDependency,
    Renderer,
    check_requirements,
    choose_renderer,
    episode_seed,
)
from envs.workers import Workers


def what_is_missing() -> str:
    """The sentence of MissingDependency, which says what to install; empty if nothing is missing."""
    try:
        check_requirements()
    except MissingDependency as error:
        return str(error)
    return ""


missing = what_is_missing()
installed = not missing
needs_package = pytest.mark.skipif(not installed, reason=missing)
FORWARD, RIGHT = ACTIONS.index("forward"), ACTIONS.index("right")


@pytest.fixture
def make():
    """-> a function that makes environments, which are closed after the test"""
    made = []

    def make(*args, **options) -> MemoryMaze:
        made.append(MemoryMaze(*args, **options))
        return made[-1]

    yield make
    for env in made:
        env.close()


@functools.cache
def recording(size):
    """60 steps of the package, in which targets are reached"""
    return record(size, {"9x9": 7, "11x11": 1, "13x13": 1, "15x15": 1}[size], 60)


def walk(env, actions, **reset_options):
    """-> the first observation and those after each action"""
    return np.stack([env.reset(**reset_options)[0], *(env.step(action)[0] for action in actions)])


@needs_package
@pytest.mark.parametrize("size", slow_but(MAX_STEPS, ["9x9"]))
def test_same_as_the_package(make, size):
    """Equal in every bit, also after another episode, when textures have been borrowed before."""
    env, seed = make(size), {"9x9": 7}.get(size, 1)
    counts = check(env, seed, *recording(size))
    if size == "9x9":
        assert counts["reward"] >= 1 and counts["steps with touches"] > 1
        walk(env, [FORWARD] * 12)
        check(env, seed, *recording(size))


def fewer_substeps(monkeypatch):
    monkeypatch.setattr(memorymaze, "SUBSTEPS", 49)


def wrong_geoms(monkeypatch):
    build = MazeFactory.build

    def build_wrongly(self, seed):
        for episode in build(self, seed):
            yield episode and dataclasses.replace(episode, geoms=[geom - 1 for geom in episode.geoms])

    monkeypatch.setattr(MazeFactory, "build", build_wrongly)


def wrong_target(monkeypatch):
    choose = MemoryMaze._choose_target
    monkeypatch.setattr(MemoryMaze, "_choose_target", lambda self: (choose(self) + 1) % 3)


def too_narrow(monkeypatch):
    out = Renderer._out_of_view
    monkeypatch.setattr(
        Renderer, "_out_of_view", lambda self, camera: out(self, camera) | (np.arange(len(self.flat)) < 30)
    )


@needs_package
@pytest.mark.parametrize("fault", [fewer_substeps, wrong_geoms, wrong_target, too_narrow])
def test_a_planted_fault_is_found(make, monkeypatch, fault):
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="^seed 7"):
        check(make("9x9"), 7, *recording("9x9"))


@needs_package
def test_an_episode_does_not_depend_on_the_maze_before(make):
    """With seed 36 the agent starts at a target, which the package then marks as touched. A draw of the next maze's
    target passes over touched ones."""
    env = make()
    alone = walk(env, [], seed=1001)
    walk(env, [], seed=36)
    assert any(env.episode.touched), "otherwise this shows nothing"
    np.testing.assert_array_equal(walk(env, [], seed=1001), alone)


@needs_package
def test_render_without_a_mode(make):
    env = make()
    env.reset(seed=1)
    with pytest.raises(ValueError, match='needs render_mode="rgb_array"'):
        env.render()


@needs_package
def test_the_seed_decides_all_episodes(make):
    """Also the later ones, whatever happens in earlier ones, and whether or not there was time to prepare them."""
    actions = [FORWARD, RIGHT] * 5
    one, two = make(), make()
    first = walk(one, actions, seed=3)
    np.testing.assert_array_equal(walk(two, actions, seed=3), first)
    later = [walk(one, actions) for _ in range(2)]  # ended early, but not before the next maze was made
    two.reset(seed=3)
    for number, expected in enumerate(later, 1):
        two.reset()
        np.testing.assert_array_equal(walk(one, actions, seed=episode_seed(3, number)), expected)
    np.testing.assert_array_equal(two._observe(), later[1][0])
    assert not any(np.array_equal(a, b) for a, b in ((first, later[0]), (later[0], later[1])))
    assert not np.array_equal(walk(two, actions, seed=4), first)
    assert not np.array_equal(make().reset()[0], make().reset()[0])  # no seed: the system's entropy


def test_seeds_of_episodes():
    seeds = [episode_seed(s, k) for s in range(40) for k in range(40)]
    assert len(set(seeds)) == 1600 and [episode_seed(s, 0) for s in (0, 7, 2**32 - 1)] == [0, 7, 2**32 - 1]
    assert all(0 <= seed < 2**32 for seed in seeds)


@needs_package
def test_time_limit_and_staggering(make):
    """Only the first episode is shorter; the limit only truncates."""
    env = make("9x9", first_episode_steps=5)
    env.reset(seed=0)
    ends = []
    for step in range(1, 1006):
        _, reward, terminated, truncated, info = env.step(RIGHT)
        assert (type(reward), terminated) == (float, False)
        if truncated:
            ends.append((step, info))
            env.reset()
    assert ends == [(5, {"shortened": True}), (1005, {})]
    env.reset(seed=0)
    assert not any(env.step(RIGHT)[3] for _ in range(10))


@needs_package
@pytest.mark.filterwarnings("ignore:.*render_modes.*")
def test_gymnasium_is_content():
    assert [gymnasium.spec(f"MemoryMaze-{size}-v0").kwargs for size in MAX_STEPS] == [{"size": s} for s in MAX_STEPS]
    env = gymnasium.make("envs.memorymaze:MemoryMaze-11x11-v0", render_mode="rgb_array")
    assert env.unwrapped.size == "11x11"
    check_env(env.unwrapped)
    env.close()


@needs_package
def test_frames_change_nothing(make):
    """Rendering between steps changes no observation and no random state; a frame shows what the agent sees."""
    actions = np.random.default_rng(0).integers(len(ACTIONS), size=15)
    plain, shown = make(), make(render_mode="rgb_array")
    expected = walk(plain, actions, seed=5)
    obs, frames = [shown.reset(seed=5)[0]], [shown.render()]
    for action in actions:
        obs.append(shown.step(action)[0])
        frames.append(shown.render())
    np.testing.assert_array_equal(obs, expected)
    states = [env.episode.random.get_state()[1] for env in (plain, shown)]
    np.testing.assert_array_equal(*states)
    assert frames[0].shape == (384, 768, 3) and frames[0].dtype == np.uint8
    for frame, seen in zip(frames, obs, strict=True):
        small = frame[:, :384].reshape(64, 6, 64, 6, 3).mean((1, 3))
        assert np.abs(small - seen).mean() < 10
        np.testing.assert_array_equal(frame[[0, 383, 100], [100, 100, 0]], seen[[0, 63, 20], [20, 20, 0]])
    assert any((frame[:, 384:] != frames[0][:, 384:]).any() for frame in frames)  # the map shows the agent


@needs_package
def test_in_workers(make):
    """Another process sees the same; each worker ends and begins episodes at its own time."""
    lengths = 4, 7
    envs = Workers([functools.partial(MemoryMaze, "9x9", first_episode_steps=n) for n in lengths])
    obs, _ = envs.reset(seed=[1, 2])
    seen, ends = [obs], []
    for _ in range(8):
        obs, _, terminated, truncated, info = envs.step(np.array([FORWARD, RIGHT]))
        seen.append(obs)
        ends.append(truncated.tolist())
        if truncated.any():
            assert info["final_info"]["shortened"][truncated].all()
    envs.close()
    assert np.argwhere(ends).tolist() == [[3, 0], [6, 1]]
    for i, (action, n) in enumerate(zip((FORWARD, RIGHT), lengths, strict=True)):
        env = make()
        expected = [*walk(env, [action] * (n - 1), seed=1 + i), *walk(env, [action] * (8 - n))]
        np.testing.assert_array_equal(np.stack(seen)[:, i], expected)


def test_arguments():
    for options, sentence in {
        ("size", "8x8"): "size 8x8: there are 9x9, 11x11, 13x13, 15x15",
        ("render_mode", "human"): "render_mode human: there are None and rgb_array",
        ("first_episode_steps", 1001): "first_episode_steps 1001: 9x9 has 1 to 1000 steps",
    }.items():
        with pytest.raises(ValueError) as error:
            MemoryMaze(**dict([options]))
        assert str(error.value) == sentence


def test_without_a_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "labmaze", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingDependency, match=r"needs the package \w+: pip install -r requirements.txt, with Python 3.11 "
    ):
        MemoryMaze()


@needs_package
def test_without_opengl(monkeypatch):
    monkeypatch.delenv("MEMORY_MAZE_GL_WORKS", raising=False)
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    with pytest.raises(MissingDependency, match="^MUJOCO_GL=nonsense draws no image here. Unset MUJOCO_GL"):
        MemoryMaze()
    tried = []

    def failure(command, env, **_):
        tried.append(env["MUJOCO_GL"])
        if tried[-1] == "glfw":
            raise subprocess.TimeoutExpired(command, 300)
        return subprocess.CompletedProcess(command, 1, stderr="Traceback ...\nImportError: no driver\n")

    monkeypatch.setattr(subprocess, "run", failure)
    monkeypatch.delenv("MUJOCO_GL")
    message = "^No OpenGL draws .* libegl1 and libgl1, or libosmesa6"
    reasons = "egl: ImportError: no driver; osmesa: .*; glfw: no image after 300 s"
    with pytest.raises(MissingDependency, match=f"{message}.* Tried {reasons}$"):
        MemoryMaze()
    assert tried == ["egl", "osmesa", "glfw"]


@needs_package
def test_capitals_in_mujoco_gl(monkeypatch):
    """MUJOCO_GL=EGL works like egl."""
    name = choose_renderer()
    monkeypatch.delenv("MEMORY_MAZE_GL_WORKS")
    monkeypatch.setenv("MUJOCO_GL", name.upper())
    assert choose_renderer() == name == os.environ["MUJOCO_GL"]


def test_importing_is_cheap():
    """Importing loads neither the package, OpenGL, JAX nor gym; playing loads only the first two."""
    script = """
import sys
import envs.memorymaze, envs.workers
heavy = {"mujoco", "dm_control", "OpenGL", "memory_maze", "labmaze", "jax", "gym"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    if installed:
        script += """
env = envs.memorymaze.MemoryMaze()
assert "mujoco" not in sys.modules
env.reset()
env.close()
assert not {"jax", "gym"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


@needs_package
@pytest.mark.slow
def test_a_script_plays_the_maze(tmp_path):
    """A rollout in two mazes, as `main` makes them: their images, the end of a shortened episode, which counts for
    learning only, and a video. (Other tests of the scripts replace the maze.)"""
    script = load("ppo_lstm_memorymaze")
    args = small_args(script, num_envs=2, num_steps=6, num_minibatches=1, total_timesteps=12, num_channels=1)
    agent = script.ActorCritic(args, len(ACTIONS))
    make_env = lambda index: functools.partial(script.make_env(args, index), first_episode_steps=4 + index)
    envs = RecordEpisodeStatistics(Workers([make_env(index) for index in range(2)]))
    try:
        current = script.begin_episodes(args, envs, agent.initial_memory(2), 0, 0)
        train_state = quick_jit(functools.partial(script.init_learner, args, envs, agent))(jax.random.key(0))
        act_fn = functools.partial(quick_jit(functools.partial(script.act, agent)), train_state.params, False)
        _, transitions, _, episodes = script.host_rollout(args, envs, act_fn, current, jax.random.key(1))
    finally:
        envs.close()
    assert transitions.obs.shape == (6, 2, 64, 64, 3) and transitions.obs.dtype == np.uint8
    assert np.argwhere(transitions.done).tolist() == [[3, 0], [4, 1]] and episodes == []
    np.testing.assert_array_equal(transitions.reset[1:], transitions.done[:-1])
    assert np.ptp(transitions.obs, axis=(2, 3, 4)).min() > 0, "every image shows something"

    apply, calls = quick_jit(functools.partial(agent.apply, train_state.params)), []

    def policy(obs, reset, memory):
        calls.append((reset.item(), memory, apply(obs, reset, memory)))
        return calls[-1][2]

    env, path = script.make_env(args)(render_mode="rgb_array"), tmp_path / "episode.gif"
    memorymaze.record_video(env, policy, agent.initial_memory(1), 1, path, max_steps=5)
    with Image.open(path) as frames:
        assert frames.n_frames == 5 and frames.size == (768, 384)
    assert [reset for reset, *_ in calls] == [True, False, False, False, False]
    for (*_, outputs), (_, memory, _) in itertools.pairwise(calls):
        assert memory is outputs[2], "the memory of one step is that of the next"
