"""Replaces Memory Maze, which takes days to learn and needs a renderer: a cue in small images."""

import functools

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

STEPS = 4


class CueMaze(gymnasium.Env):
    """First red or green, then black twice, then white: now an even action pays 1 after red, an odd one after green.

    A random policy is right half of the time, and so is the best one without memory. So there is nothing to learn but
    to remember. All episodes are equally long, as in the maze; the first one may be shorter. Those with a red cue are
    truncated, the others terminated.
    """

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
        reward = float(self.time == STEPS - 1 and action % 2 == self.cue)
        self.time += 1
        ends = [self.time == self.limit and self.cue == cue for cue in (1, 0)]
        shortened = self.time == self.limit < STEPS
        return self.observe(), reward, *ends, {"shortened": True} if shortened else {}

    def render(self):
        return np.repeat(np.repeat(self.observe(), 8, axis=0), 8, axis=1)


def make_env(args, index: int = 0):
    """Like the scripts' make_env."""
    return functools.partial(CueMaze, STEPS if args.evaluate else STEPS - index * STEPS // args.num_envs)


def in_turn(env_fns):
    """The environments as main makes them, but in this process: much faster for many small steps."""
    return RecordEpisodeStatistics(SyncVectorEnv(env_fns, autoreset_mode=AutoresetMode.SAME_STEP))
