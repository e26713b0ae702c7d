"""Plays this repository's Memory Maze and the package's side by side, and compares all outputs.

    python tests/compare_memorymaze.py --size 9x9 --steps 1000 --seeds 1 2

Observations, rewards and, after each substep, contacts must be equal in every bit. Most actions walk towards the
current target, so that targets are reached; about one in five is random. Without --size it plays all four sizes,
without --steps whole episodes.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import memorymaze


class Walker:
    """Chooses actions along the shortest path to the target, through the centres of the maze's cells."""

    def __init__(self, package_env, seed: int):
        self.task, self.physics = package_env.task, package_env.physics
        self.random = np.random.default_rng(seed)
        self.arena = self.task._maze_arena
        self.free = ~np.char.isdigit(self.arena.maze.entity_layer) & (self.arena.maze.entity_layer != "*")

    def cell(self, position) -> tuple[int, int]:
        return tuple(int(round(float(x))) for x in self.arena.world_to_grid_positions([position])[0])

    def distances(self, goal) -> np.ndarray:
        """-> distance of each cell to the goal, in cells"""
        distance = np.full(self.free.shape, np.inf)
        distance[goal], border = 0, [goal]
        while border:
            y, x = border.pop(0)
            for cell in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if self.free[cell] and distance[cell] == np.inf:
                    distance[cell] = distance[y, x] + 1
                    border.append(cell)
        return distance

    def action(self) -> int:
        if self.random.random() < 0.2:
            return int(self.random.integers(6))
        head = self.physics.bind(self.task._walker.root_body)
        target = self.physics.bind(self.task._targets[self.task._current_target_ix].geom)
        distance, (y, x) = self.distances(self.cell(target.xpos)), self.cell(head.xpos)
        cells = [(y, x), (y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        nearest = min(cells, key=lambda cell: distance[cell])
        aim = np.array(self.arena.grid_to_world_positions([nearest])[0][:2]) - head.xpos[:2]
        ahead, right = np.array(head.xmat).reshape(3, 3)[:2, 1], np.array(head.xmat).reshape(3, 3)[:2, 0]
        turn = np.arctan2(aim @ right, aim @ ahead)
        if abs(turn) < 0.25:
            return 1
        side = "right" if turn > 0 else "left"
        return memorymaze.ACTIONS.index(side if abs(turn) > 0.7 else f"forward+{side}")


class Step(NamedTuple):
    action: int
    obs: np.ndarray
    reward: float
    last: bool
    contacts: np.ndarray  # (contacts of all substeps, 2), the geoms that touch
    position: np.ndarray  # of the agent's joints


def record(size: str, seed: int, num_steps: int) -> tuple[np.ndarray, list[Step]]:
    """-> the package's first observation, its steps"""
    package = getattr(memorymaze.import_game().tasks, f"memory_maze_{size}")(image_only_obs=True, seed=seed)
    contacts = []
    package.add_extra_hook("after_substep", lambda physics, _: contacts.append(physics.data.contact.geom.copy()))
    first_obs, walker, steps = package.reset().observation, Walker(package, seed), []
    for _ in range(num_steps):
        contacts.clear()
        action = walker.action()
        time_step = package.step(action)
        position = package.physics.data.qpos.copy()
        result = time_step.observation, time_step.reward, time_step.last(), np.concatenate(contacts), position
        steps.append(Step(action, *result))
    package.close()
    return first_obs, steps


def check(env: memorymaze.MemoryMaze, seed: int, first_obs: np.ndarray, steps: list[Step]) -> dict:
    """-> counts. Raises AssertionError at the first difference."""
    assert np.array_equal(env.reset(seed=seed)[0], first_obs), f"seed {seed}: the first observation differs"
    counts = {"steps": 0, "reward": 0.0, "steps with touches": 0, "contacts": 0}
    for i, step in enumerate(steps):
        obs, reward, terminated, truncated, _ = env.step(step.action)
        where = f"seed {seed}, step {i}"
        assert np.array_equal(env.episode.data.qpos, step.position), f"{where}: the position differs"
        assert np.array_equal(env.contacts, step.contacts), f"{where}: the contacts differ"
        assert reward == step.reward, f"{where}: reward {reward}, not {step.reward}"
        assert np.array_equal(obs, step.obs), f"{where}: the observation differs"
        assert (terminated, truncated) == (False, step.last), f"{where}: the end differs"
        counts["steps"] += 1
        counts["reward"] += reward
        counts["steps with touches"] += int(np.isin(step.contacts, env.episode.geoms).any())
        counts["contacts"] += len(step.contacts)
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=memorymaze.MAX_STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    for size in [args.size] if args.size else memorymaze.MAX_STEPS:
        for seed in args.seeds:
            start = time.time()
            env = memorymaze.MemoryMaze(size)
            counts = check(env, seed, *record(size, seed, args.steps or memorymaze.MAX_STEPS[size]))
            env.close()
            print(f"{size}, seed {seed}: the same. {counts}, {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
