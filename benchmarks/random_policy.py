"""Evaluates a random policy in a script's environment: the baseline that learning must beat.

    python benchmarks/random_policy.py ppo_agalite_craftax.py --env-id Craftax-Classic-Symbolic-v1 --eval-episodes 200

The flags are the script's own; only --env-id, --seed, --eval-episodes and the environment's sizes matter here,
on Memory Maze also --num-envs, the number of processes.
"""

import functools
import inspect
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.results import interval
from benchmarks.scripts import load


class RandomAgent(NamedTuple):
    """All actions are equally likely; no memory."""

    num_actions: int

    def initial_memory(self, B: int):
        return ()

    def apply(self, params, obs, reset, memory):
        return jnp.zeros((*reset.shape, self.num_actions)), jnp.zeros(reset.shape), memory


def evaluate(script, args) -> dict[str, np.ndarray]:
    """-> return, length and other outcomes of each episode, (E,) each."""
    if hasattr(script, "host_evaluate"):  # environments in separate processes
        workers = script.Workers([script.make_env(args, index) for index in range(args.num_envs)])
        envs = script.RecordEpisodeStatistics(workers)
        try:
            agent = RandomAgent(envs.single_action_space.n)
            policy = functools.partial(jax.jit(functools.partial(script.act, agent)), (), False)
            rows = script.host_evaluate(args, envs, (), policy)
            return dict(zip(("episodic_return", "episodic_length"), rows.T, strict=True))
        finally:
            envs.close()
    options = {"evaluation": True} if "evaluation" in inspect.signature(script.make_env).parameters else {}
    env = script.make_env(args, args.eval_episodes, **options)
    agent = RandomAgent(env.action_space(env.default_params).n)
    play = jax.jit(functools.partial(script.evaluate, env, agent, greedy=False))
    return play((), jax.random.key(args.seed))


def main(path: str, *flags: str) -> None:
    script = load(path)
    args = script.parse_args(list(flags))
    for name, values in evaluate(script, args).items():
        mean, half = interval(values)
        print(f"{name.removeprefix('episodic_')}: {mean:.3g} ± {half:.2g}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(f"usage: {sys.argv[0]} ppo_<memory>_<task>.py [its flags]")
    main(*sys.argv[1:])
