"""benchmarks/results.py decides what README calls solved."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from results import solved_at


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
