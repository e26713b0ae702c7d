"""Mystery Path: steps per second, with images, of ours and of Memory Gym, and what drawing paths costs.

    taskset -c 1 python benchmarks/environments.py --memory-gym-python memory-gym/bin/python

Memory Gym needs another virtual environment (tests/record_mysterypath.py says how to make one); without it, its column
is "not run". The two run in turn, with random actions and through ends of episodes, on the one core that taskset
leaves to both. Ours steps 256 environments in a jitted loop of 128 steps, and draws a new pool of paths before each,
which is counted. Images are made in each step but, unlike in training, not kept. tests/test_mysterypath.py shows that
both do the same.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NUM_ENVS, NUM_STEPS, ROUNDS, SECONDS = 256, 128, 5, 2.0
EASY = {"show_origin": True, "show_goal": True, "reward_path_progress": 0.1}
IDS = {
    "MysteryPath-Grid-Easy-v0": ("MysteryPath-Grid-v0", EASY),
    "MysteryPath-Grid-v0": ("MysteryPath-Grid-v0", {}),
    "MysteryPath-Easy-v0": ("MysteryPath-v0", EASY),
    "MysteryPath-v0": ("MysteryPath-v0", {}),
}


def measure_memory_gym(env_id: str) -> dict:
    """-> steps/s with resets, µs per reset. Run by the Python that has Memory Gym and no JAX."""
    os.environ["SDL_VIDEODRIVER"] = "dummy"
    import gymnasium
    import memory_gym  # noqa: F401 (registers the environments)

    name, options = IDS[env_id]
    env = gymnasium.make(name, disable_env_checker=True).unwrapped
    env.reset(seed=0, options=options)
    shape = (4096,) if "Grid" in name else (4096, 2)
    actions = np.random.default_rng(0).integers(4 if "Grid" in name else 3, size=shape).tolist()
    steps, resets, resetting, begin = 0, 0, 0.0, time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        done = env.step(actions[steps % len(actions)])[2]
        steps += 1
        if done:
            start = time.perf_counter()
            env.reset(options=options)
            resets, resetting = resets + 1, resetting + time.perf_counter() - start
    return {"rate": steps / (time.perf_counter() - begin), "reset": 1e6 * resetting / max(resets, 1)}


class Ours:
    """Compiled once; `measure` runs for SECONDS."""

    def __init__(self, env_id: str, pool_size: int):
        import jax

        from envs.mysterypath import MysteryPath
        from envs.wrappers import EpisodeStatistics, PooledReset

        env = PooledReset(EpisodeStatistics(MysteryPath(env_id)), NUM_ENVS, pool_size)
        params = env.default_params
        num_actions = env.action_space(params).n

        def rollout(key, obs, state):
            def step(carry, key):
                action_key, step_key = jax.random.split(key)
                action = jax.random.randint(action_key, (NUM_ENVS,), 0, num_actions)
                obs, state, _, done, _ = env.step(step_key, carry[1], action, params)
                return (obs, state), done.sum()

            (obs, state), episodes = jax.lax.scan(step, (obs, state), jax.random.split(key, NUM_STEPS))
            return obs, state, episodes.sum()

        self.keys = map(jax.random.key, range(10**9))
        self.block = jax.block_until_ready
        self.refresh = jax.jit(lambda key, state: env.refresh(key, state, params))
        self.rollout = jax.jit(rollout)
        self.obs, self.state = jax.jit(lambda key: env.reset(key, params))(next(self.keys))
        self.obs, self.state, _ = self.rollout(next(self.keys), self.obs, self.refresh(next(self.keys), self.state))
        self.device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"

    def measure(self) -> dict:
        """-> steps/s with refreshes, ms per refresh, its share of the time, episodes per environment and rollout."""
        steps, refreshing, episodes, begin = 0, [], [], time.perf_counter()
        while time.perf_counter() - begin < SECONDS:
            start = time.perf_counter()
            self.state = self.block(self.refresh(next(self.keys), self.state))
            refreshing.append(time.perf_counter() - start)
            self.obs, self.state, ended = self.block(self.rollout(next(self.keys), self.obs, self.state))
            episodes.append(int(ended) / NUM_ENVS)
            steps += NUM_ENVS * NUM_STEPS
        elapsed = time.perf_counter() - begin
        return {
            "rate": steps / elapsed,
            "refresh": 1e3 * float(np.mean(refreshing)),
            "share": sum(refreshing) / elapsed,
            "episodes": float(np.mean(episodes)),
        }


def median(rows: list[dict]) -> dict:
    return {name: float(np.median([row[name] for row in rows])) for name in rows[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--memory-gym-python", help="the python of a virtual environment with memory-gym==1.0.2")
    parser.add_argument("--pool-size", type=int, default=16, help="paths per environment and rollout")
    parser.add_argument("--as-memory-gym", choices=IDS, help=argparse.SUPPRESS)  # this file, as run by that python
    args = parser.parse_args()
    if args.as_memory_gym:
        print(json.dumps(measure_memory_gym(args.as_memory_gym)))
        return

    sys.path.insert(0, str(ROOT))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for i, env_id in enumerate(IDS):
        ours, rows, theirs = Ours(env_id, args.pool_size), [], []
        if i == 0:
            print(f"{ours.device}, {cores} core(s); {NUM_ENVS} environments, pools of {args.pool_size}\n")
            columns = ["", "steps/s", "Memory Gym's", "ratio", "refresh, ms", "its share of the time", "µs per path"]
            columns += ["Memory Gym's reset, µs", "episodes per environment and rollout"]
            print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
        for _ in range(ROUNDS):
            rows.append(ours.measure())
            if args.memory_gym_python:
                command = [args.memory_gym_python, __file__, "--as-memory-gym", env_id]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                theirs.append(json.loads(output.splitlines()[-1]))
        a = median(rows)
        gym, ratio, reset = ["not run"] * 3
        if theirs:
            b = median(theirs)
            gym, ratio, reset = f"{b['rate']:,.0f}", f"{a['rate'] / b['rate']:.0f}", f"{b['reset']:,.0f}"
        path = 1e3 * a["refresh"] / (NUM_ENVS * args.pool_size)
        print(
            f"| {env_id} | {a['rate']:,.0f} | {gym} | {ratio} | {a['refresh']:.1f} | {a['share']:.0%} | {path:.1f} "
            f"| {reset} | {a['episodes']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
