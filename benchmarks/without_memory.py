"""Runs a script without its agent's memory, for comparison: the memory is reset at every step.

    python benchmarks/without_memory.py ppo_agalite_mysterypath.py --total-timesteps 5e5

Everything else is the script's: network, learning, flags, and the run's folder, whose name has "without_memory" in it.
Resume and evaluate such a run with this file, too: the script alone would give the agent its memory back.
"""

import sys
from pathlib import Path

import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.scripts import load


def forgetful(agent: type) -> type:
    """The same agent, whose memory is reset at every step."""

    class Forgetful(agent):
        def __call__(self, obs, reset, memory):
            return super().__call__(obs, jnp.ones_like(reset), memory)

    return Forgetful


def main(path: str, *flags: str) -> None:
    script = load(path)
    sys.argv[0] += f" {path}"  # the script prints this as the command to resume
    script.ActorCritic = forgetful(script.ActorCritic)
    script.main(script.parse_args([f"--exp-name={script.Args.exp_name}_without_memory", *flags]))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(f"usage: {sys.argv[0]} ppo_<memory>_<task>.py [its flags]")
    main(*sys.argv[1:])
