"""Memory Maze: steps per second of ours and of the original package, what a new maze costs, and who waits for it.

    taskset -c 1 python benchmarks/memorymaze.py
    python benchmarks/memorymaze.py --workers 2

The first command plays both in turn, in one process on one core, with the same actions: mostly forward, with turns. It
times resets separately. The second times the steps of Workers, through ends of episodes at different times, and
separately the steps in which an episode ends or the next maze is made: in wall-clock time, which other programs on the
machine disturb, and in CPU time. tests/compare_memorymaze.py shows that ours and the package do the same.
"""

import argparse
import functools
import importlib.metadata
import os
import platform
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import memorymaze
from envs.memorymaze import MAX_STEPS, MemoryMaze
from envs.workers import Workers

ROUNDS, SECONDS, RESETS = 5, 3.0, 3
BUILD_STEPS = 9  # more steps than a new maze takes
CHOICES = [1, 1, 1, 4, 4, 2, 5, 3]


def timed(function) -> float:
    """-> ms"""
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def steps_per_second(step, actions) -> float:
    steps, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        step(next(actions))
        steps += 1
    return steps / (time.perf_counter() - begin)


def endless_actions(seed: int):
    rng = np.random.default_rng(seed)
    while True:
        yield int(rng.choice(CHOICES))


def one_core(size: str):
    package = getattr(memorymaze.load().tasks, f"memory_maze_{size}")(image_only_obs=True, seed=1)
    ours, rates = MemoryMaze(size), []
    package.reset()
    ours.reset(seed=1)
    actions = endless_actions(0), endless_actions(0)
    for step in (ours.step, package.step):  # the first images take longer
        steps_per_second(step, endless_actions(1))
    for _ in range(ROUNDS):
        package.reset()  # otherwise it would reset during the timed steps
        rates.append((steps_per_second(ours.step, actions[0]), steps_per_second(package.step, actions[1])))
    their_reset = np.median([timed(package.reset) for _ in range(RESETS)])
    unprepared, prepared, during = [], [], []
    for _ in range(RESETS):
        ours.reset()
        unprepared.append(timed(ours.reset))
        during.append(max(timed(lambda: ours.step(1)) for _ in range(BUILD_STEPS)))
        prepared.append(timed(ours.reset))
    package.close()
    ours.close()
    a, b = np.median(rates, axis=0)
    times = " | ".join(f"{np.median(x):.0f}" for x in (prepared, during, unprepared))
    print(f"| {size} | {a:.0f} | {b:.0f} | {a / b:.1f} | {times} | {their_reset:,.0f} |", flush=True)


class Clocked(gymnasium.Wrapper):
    """Adds the call's CPU time in ms to info: other programs on the machine hardly change it."""

    def _clock(self, function, *args, **kwargs):
        start = time.process_time()
        *rest, info = function(*args, **kwargs)
        return *rest, info | {"cpu": 1e3 * (time.process_time() - start)}

    def reset(self, **kwargs):
        return self._clock(self.env.reset, **kwargs)

    def step(self, action):
        return self._clock(self.env.step, action)


def clocked_maze(size: str, first_episode_steps: int) -> gymnasium.Env:
    return Clocked(MemoryMaze(size, first_episode_steps=first_episode_steps))


def workers(size: str, num_envs: int, num_steps: int):
    lengths = [MAX_STEPS[size] * (i + 1) // num_envs for i in range(num_envs)]
    envs = Workers([functools.partial(clocked_maze, size, n) for n in lengths])
    envs.reset(seed=1)
    rng, rows, making, since, ends = np.random.default_rng(0), [], [], 0, 0
    for _ in range(num_steps):
        actions = rng.choice(CHOICES, num_envs)
        start = time.perf_counter()
        *_, truncated, info = envs.step(actions)
        wall = 1e3 * (time.perf_counter() - start)
        before_reset = info["final_info"]["cpu"] if truncated.any() else 0.0
        rows.append((wall, (info["cpu"] + before_reset).max()))
        since = 0 if truncated.any() else since + 1
        ends += int(truncated.sum())
        making.append(since < BUILD_STEPS)
    envs.close()
    making = np.array(making)
    print(
        f"{size}, {num_envs} workers, {num_steps} steps, {ends} ends of episodes, {making.sum()} steps with a new maze"
    )
    for name, times in zip(("wall clock", "CPU time of the slowest worker"), np.transpose(rows), strict=True):
        middle, late = np.median(times), np.percentile(times, 99)
        print(f"{name}: median {middle:.1f} ms, 99th percentile {late:.1f} ms ({late / middle:.1f} times), ", end="")
        print(f"longest {times.max():.0f} ms; with a new maze median {np.median(times[making]):.1f} ms, ", end="")
        print(f"99th percentile {np.percentile(times[making], 99):.1f} ms", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=MAX_STEPS, nargs="+", default=list(MAX_STEPS))
    parser.add_argument("--workers", type=int, help="number of environments, each a process")
    parser.add_argument("--num-steps", type=int, default=3000)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mujoco", "dm_control"))
    memorymaze.choose_renderer()
    print(f"{platform.machine()}, {cores} core(s), {versions}, MUJOCO_GL={os.environ['MUJOCO_GL']}\n", flush=True)
    if args.workers:
        for size in args.size:
            workers(size, args.workers, args.num_steps)
        return
    columns = ["", "steps/s", "the package's", "ratio", "reset, ms", "longest step while a maze is made, ms"]
    columns += ["a reset without preparation, ms", "the package's reset, ms"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for size in args.size:
        one_core(size)


if __name__ == "__main__":
    main()
