"""A pure Python Gymnasium environment for the tests of Workers: actions make it count, wait, raise or die."""

import os
import sys
import time

import gymnasium
import numpy as np
from gymnasium import spaces

ACTIONS = STEP, WAIT, RAISE, RAISE_UNPICKLABLE, EXIT, LOOP = range(6)


class Tiny(gymnasium.Env):
    """Observation (2,): the step within the episode, and the episode's number. It ends after `length` steps: even
    episodes are truncated, odd ones terminated."""

    observation_space = spaces.Box(0, 1e6, (2,), np.float32)
    action_space = spaces.Discrete(len(ACTIONS))

    def __init__(self, length: int = 3, fails: bool = False):
        if fails:
            raise OSError("no such\nthing")
        self.length, self.episode, self.state = length, -1, {"reset": 0}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.episode = 0, 0 if seed is not None else self.episode + 1
        return self._obs(), {"seed": -1 if seed is None else seed}

    def step(self, action):
        if action == WAIT:
            time.sleep(60)
        elif action == RAISE:
            raise ValueError("two lines\nof text")
        elif action == RAISE_UNPICKLABLE:
            raise type("Local", (Exception,), {"payload": sys.stdin})("cannot be sent")
        elif action == EXIT:
            os._exit(7)
        while action == LOOP:
            pass
        self.steps += 1
        ends = [self.steps == self.length and self.episode % 2 == odd for odd in (1, 0)]
        return self._obs(), 0.5, *ends, {"steps": self.steps}

    def _obs(self):
        return np.array([self.steps, self.episode], np.float32)

    def modules(self) -> list[str]:
        return sorted(sys.modules)

    def threads(self) -> str | None:
        return os.environ.get("OPENBLAS_NUM_THREADS")
