"""In place of Memory Maze, which takes days to learn and a renderer to draw: a cue in small pictures."""

import functools

import gymnasium
import jax
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

STEPS = 4


class CueMaze(gymnasium.Env):
    """Red or green at first, then black twice, then white, when action 0 after red or 1 after green pays 1. All
    episodes end by their time limit, as in the maze."""

    observation_space = spaces.Box(0, 255, (8, 8, 3), np.uint8)
    action_space = spaces.Discrete(6)

    def __init__(self, first_episode_steps: int = STEPS, render_mode: str | None = None):
        self.first_limit, self.limit = first_episode_steps, None

    def observe(self) -> np.ndarray:
        colour = (np.arange(3) == self.cue) if self.time == 0 else np.full(3, self.time == STEPS - 1)
        return np.broadcast_to(255 * colour.astype(np.uint8), (8, 8, 3)).copy()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.limit = STEPS if self.limit else self.first_limit
        self.time, self.cue = 0, int(self.np_random.integers(2))
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        reward = float(self.time == STEPS - 1 and action == self.cue)
        self.time += 1
        return self.observe(), reward, False, self.time == self.limit, {}

    def render(self):
        return np.repeat(np.repeat(self.observe(), 8, axis=0), 8, axis=1)


def make_env(args, share: float = 1.0):
    """As that of the scripts."""
    return functools.partial(CueMaze, max(1, round(share * STEPS)))


def made_up_rollout(script, args, acts, params, halves, key):
    """In place of `host_rollout`: this process' share of a rollout that depends on nothing."""
    rng, (T, B) = np.random.default_rng(0), (args.num_steps, args.num_envs)
    b = B // jax.process_count()
    mine = slice(jax.process_index() * b, (jax.process_index() + 1) * b)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    transitions = script.Transition(
        obs=rng.integers(0, 256, (T, B, 8, 8, 3), np.uint8), reset=rng.random((T, B)) < 0.2, noise=normal(T, B, 6),
        action=rng.integers(0, 6, (T, B), np.int32), log_prob=normal(T, B), value=normal(T, B), reward=normal(T, B),
        done=rng.random((T, B)) < 0.2,
    )  # fmt: skip
    return jax.tree.map(lambda x: x[:, mine], transitions), normal(B)[mine], []


class InTurn(SyncVectorEnv):
    """What the host loop asks of envs.workers.Workers, in this process: for many small steps, much faster."""

    def __init__(self, env_fns):
        super().__init__(env_fns, autoreset_mode=AutoresetMode.SAME_STEP)

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        return self.step(self.actions)
