"""Evaluates a policy that draws its actions at random in a script's environment: what learning has to be better than.

    python benchmarks/random_policy.py ppo_agalite_craftax.py --env-id Craftax-Classic-Symbolic-v1 --eval-episodes 200

The flags are the script's own; --env-id, --seed, --eval-episodes and the environment's sizes are what matters here.
"""

import functools
import importlib
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))


class RandomAgent(NamedTuple):
    """All actions alike, no memory."""

    num_actions: int

    def initial_memory(self, B: int):
        return ()

    def apply(self, params, obs, reset, memory):
        return jnp.zeros((*reset.shape, self.num_actions)), jnp.zeros(reset.shape), memory


def evaluate(script, args) -> dict[str, np.ndarray]:
    """-> return, length and what else the environment tells of an episode, (E,) each."""
    key = jax.random.key(args.seed)
    if hasattr(script, "host_evaluate"):  # environments in processes of their own
        crews = [script.Workers([script.make_env(args)] * (args.num_envs // 2)) for _ in range(2)]
        try:
            agent = RandomAgent(crews[0].single_action_space.n)
            chooses = jax.jit(functools.partial(script.choose, agent, False))
            rows = script.host_evaluate(args, chooses, (), [script.Half(agent, crew) for crew in crews], key)
            return dict(zip(("episodic_return", "episodic_length"), rows.T, strict=True))
        finally:
            for crew in crews:
                crew.close()
    env = script.make_env(args, args.eval_episodes)
    agent = RandomAgent(env.action_space(env.default_params).n)
    return jax.jit(functools.partial(script.evaluate, args, env, agent, greedy=False))((), key)


def main(path: str, *flags: str) -> None:
    script = importlib.import_module(Path(path).stem)
    args = script.parse_args(list(flags))
    for name, value in evaluate(script, args).items():
        print(f"{name.removeprefix('episodic_')}: {script.interval(value)}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1]).name.startswith("ppo_"):
        raise SystemExit(f"usage: {sys.argv[0]} ppo_<model>_<env>.py [its flags]")
    main(*sys.argv[1:])
