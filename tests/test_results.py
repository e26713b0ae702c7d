"""benchmarks/results.py decides what README calls solved, benchmarks/without_memory.py what a memory is worth."""

import sys
from pathlib import Path

import jax
import numpy as np
from common import FIRST, assert_close, build, load, quick_jit, random_observations, small_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from results import solved_at
from without_memory import forgetful


def rows_of(*updates):
    names = ("charts/episodes", "charts/success_rate", "global_step", "elapsed")
    return [dict(zip(names, (*update, 100 * i, 60 * i), strict=True)) for i, update in enumerate(updates, 1)]


def test_solved_needs_two_hundred_episodes():
    """199 successes in a row are not yet 200 episodes; the 200th decides."""
    assert solved_at(rows_of((199, 1.0))) is None
    assert solved_at(rows_of((199, 1.0), (0, ""), (1, 1.0))) == (300, 3.0)


def test_solved_is_the_first_time_and_forgets_old_failures():
    """Failures older than the window do not count, those inside do."""
    assert solved_at(rows_of((500, 0.0), (100, 1.0), (100, 1.0), (100, 0.0))) == (300, 3.0)
    assert solved_at(rows_of((500, 0.0), (100, 1.0), (100, 0.89))) is None
    assert solved_at(rows_of((100, 1.0), (100, 0.91), (100, 0.0))) == (200, 2.0)


def test_without_memory_no_step_knows_of_another():
    """The agent with its memory taken away does over a sequence what it does with each step alone."""
    script = load(*FIRST)
    args = small_args(script)
    env, _, _ = build(script, args)
    agent, obs, reset = (
        forgetful(script.ActorCritic)(args, 4),
        random_observations(env, 0, (5, 3)),
        np.zeros((5, 3), bool),
    )
    params = agent.init(jax.random.key(0), obs, reset, agent.initial_memory(3))
    apply = quick_jit(agent.apply)
    logits, value, memory = apply(params, obs, reset, agent.initial_memory(3))
    for t in range(5):
        assert_close(apply(params, obs[t : t + 1], reset[:1], memory)[:2], (logits[t : t + 1], value[t : t + 1]), 1e-5)
