"""Plays Memory Maze in this repository and in its package side by side, and compares all that comes out.

    python tests/compare_memorymaze.py --size 9x9 --steps 1000 --seeds 1 2

Observations, rewards and, after each substep, contacts must be the same to the last bit. Most actions walk towards the
present target, so that targets are reached; each fifth or so is random. Without --size all four are played, without
--steps whole episodes.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import memorymaze


class Walker:
    """Chooses actions: along the shortest way to the target, through the centres of the maze's cells."""

    def __init__(self, package_env, seed: int):
        self.task, self.physics = package_env.task, package_env.physics
        self.random = np.random.default_rng(seed)
        self.arena = self.task._maze_arena
        self.free = ~np.char.isdigit(self.arena.maze.entity_layer) & (self.arena.maze.entity_layer != "*")

    def cell(self, position) -> tuple[int, int]:
        return tuple(int(round(float(x))) for x in self.arena.world_to_grid_positions([position])[0])

    def distances(self, goal) -> np.ndarray:
        """-> of each cell, in steps"""
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


class Contacts:
    """Notes all contacts of a MuJoCo simulation, one array a substep."""

    def __init__(self):
        self.seen = []

    def after_substep(self, physics, random):
        self.seen.append(physics.data.contact.geom.copy())


def compare(size: str, seed: int, steps: int, env=None, follow=True) -> dict:
    """-> counts. Raises AssertionError at the first difference."""
    tasks = memorymaze.load().tasks
    package = getattr(tasks, f"memory_maze_{size}")(image_only_obs=True, seed=seed)
    contacts = Contacts()
    package.add_extra_hook("after_substep", contacts.after_substep)
    env = env or memorymaze.MemoryMaze(size)
    np.testing.assert_array_equal(env.reset(seed=seed)[0], package.reset().observation)
    walker = Walker(package, seed)
    counts = {"steps": 0, "reward": 0.0, "touches": 0, "contacts": 0}
    for step in range(steps):
        action = walker.action()
        contacts.seen.clear()
        expected = package.step(action)
        obs, reward, terminated, truncated, _ = env.step(action)
        assert np.array_equal(obs, expected.observation), f"seed {seed}, step {step}: another observation"
        assert reward == expected.reward, f"seed {seed}, step {step}: reward {reward}, not {expected.reward}"
        assert (terminated, truncated) == (False, expected.last()), f"seed {seed}, step {step}: another end"
        seen = np.concatenate(contacts.seen)
        assert np.array_equal(env.contacts, seen), f"seed {seed}, step {step}: other contacts"
        assert np.array_equal(env.episode.data.qpos, package.physics.data.qpos)
        counts["steps"] += 1
        counts["reward"] += reward
        counts["touches"] += int(np.isin(seen, env.episode.geoms).any())
        counts["contacts"] += len(seen)
    env.close()
    package.close()
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
            counts = compare(size, seed, args.steps or memorymaze.MAX_STEPS[size])
            print(f"{size}, seed {seed}: the same. {counts}, {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
