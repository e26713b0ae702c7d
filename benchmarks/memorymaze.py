"""Memory Maze: steps per second of ours and of the original package, and what a new maze costs.

    taskset -c 1 python benchmarks/memorymaze.py

Plays both in turn, in one process on one core, with the same actions: mostly forward, with turns. Resets are timed
separately: ours makes the next maze in small parts, during the first steps of an episode. A reset before that, without
preparation, makes it at once. tests/compare_memorymaze.py shows that ours and the package do the same.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import memorymaze
from envs.memorymaze import MAX_STEPS, MemoryMaze

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
    package = getattr(memorymaze.import_game().tasks, f"memory_maze_{size}")(image_only_obs=True, seed=1)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=MAX_STEPS, nargs="+", default=list(MAX_STEPS))
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mujoco", "dm_control"))
    memorymaze.choose_renderer()
    print(f"{platform.machine()}, {cores} core(s), {versions}, MUJOCO_GL={os.environ['MUJOCO_GL']}\n", flush=True)
    columns = ["", "steps/s", "the package's", "ratio", "reset, ms", "longest step while a maze is made, ms"]
    columns += ["a reset without preparation, ms", "the package's reset, ms"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for size in args.size:
        one_core(size)


if __name__ == "__main__":
    main()
