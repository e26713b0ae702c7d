"""What a run leaves; a killed and resumed run leaves the same. `main` is the same text in all scripts of a task
(test_sync.py), so not every script runs. For Memory Maze see test_memorymaze_scripts.py."""

import json
import math
import random
import re
import signal
import time

import jax
import pytest
import sync
from cli import (
    BATCH,
    assert_same_outcome,
    checkpoint,
    finish,
    finished,
    folder_of,
    printed,
    rows,
    saved_args,
    start,
    steps,
    wait_for_row,
)
from common import CRAFTAX, FEW, FIRST, SCRIPTS
from PIL import Image

pytestmark = pytest.mark.slow

COLUMNS = ["update", "seed", "global_step", "elapsed", "charts/SPS"]
COLUMNS += ["charts/episodic_return", "charts/episodic_length", "charts/episodes", "charts/learning_rate"]
COLUMNS += ["losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac"]
COLUMNS += ["losses/explained_variance", "losses/grad_norm"]


def check_metrics(folder, updates: int, outcome: str, low: float, high: float):
    """One row per update, in order, all numbers finite, cells empty only if no episode ended, and an outcome
    from low to high."""
    table = rows(folder)
    assert {*COLUMNS, f"charts/{outcome}"} <= set(table[0])
    episodic = [name for name in table[0] if "episodic" in name or "achievements/" in name or outcome in name]
    expected = [(update, 1, update * BATCH) for update in range(1, updates + 1)]
    assert [(int(row["update"]), int(row["seed"]), int(row["global_step"])) for row in table] == expected
    for row in table:
        for name in row:
            if name not in episodic:
                assert math.isfinite(float(row[name])), (name, row)
        ended = float(row["charts/episodes"]) > 0
        assert [name for name in episodic if (row[name] != "") != ended] == []
        assert not ended or low <= float(row[f"charts/{outcome}"]) <= high
    assert {float(row["charts/episodes"]) > 0 for row in table} == {True, False}, "the test must see both kinds"
    assert max(float(row["charts/SPS"]) for row in table) > 0  # of a single slow update it may round to 0


# The first script of each task also makes a video and uses --track.
FIRST_OF_TASKS = "ppo_agalite_tmaze", "ppo_agalite_mysterypath", "ppo_agalite_craftax"
OWN = [name for name in SCRIPTS if f"{name}.py" not in sync.PROJECT]  # a user's: nothing compares their `main`
UPDATES = {"tmaze": 100, "mysterypath": 16, "craftax": 40}  # of a run; images make updates slow


def updates_of(script) -> int:
    return UPDATES[script.split("_")[-1]]


def run_to_its_end(script):
    """The run that both tests use."""
    switches = ["--capture-video", "--track"] * (script in FIRST_OF_TASKS)
    return finished(script, updates_of(script), updates_of(script) // 4, *switches)


@pytest.mark.parametrize("script", FEW)
def test_run_leaves_what_it_promises(script):
    """A run leaves arguments, metrics, checkpoints, curve, video and evaluation; the terminal shows the results."""
    folder = run_to_its_end(script)
    # Losing health costs a little.
    outcome, low, high = ("score", -5, 100) if script in CRAFTAX else ("success_rate", 0, 1)
    assert folder.name.split("__")[1:3] == [script, "1"]
    args, updates = saved_args(folder), updates_of(script)
    assert args["total_timesteps"] == updates * BATCH and args["num_envs"] * args["num_steps"] == BATCH
    check_metrics(folder, updates, outcome, low, high)
    assert steps(folder) == [updates - updates // 4, updates], "the two newest"
    with Image.open(folder / "learning_curve.png") as image:
        image.load()
        assert min(image.size) > 100
    assert (folder / "episode.gif").exists() == (script in FIRST_OF_TASKS)
    if script in FIRST_OF_TASKS:
        with Image.open(folder / "episode.gif") as video:
            assert video.n_frames > 1
    evaluation = json.loads((folder / "evaluation.json").read_text())
    name = outcome.removesuffix("_rate")
    for kind in ("sampled", "greedy"):
        assert len(evaluation[kind][name]) == 1 and low <= evaluation[kind][name][0] <= high
        assert evaluation[kind]["episodic_length"][0] >= 1
    assert bool(list((folder / "wandb").rglob("*.wandb"))) == (script in FIRST_OF_TASKS), "offline, it keeps a record"
    assert {path.name for path in folder.parents[1].iterdir()} == {"runs", "printed.json"}, "nothing outside runs/"

    out, err = printed(folder)
    lines = out.splitlines()
    assert lines[0] == f"Run folder: {folder}" and lines[1].startswith("Compiling"), "printed before the long wait"
    size = sum(x[0].size for x in jax.tree.leaves(checkpoint(folder)["train_state"]["params"]))
    assert lines[2] == f"{size:,} parameters, {updates} updates of {BATCH} steps"
    assert "step/s" in err and "episodic_return=" in err and f"{outcome}=" in err
    for line, kind in zip(lines[3:5], ("sampled", "greedy"), strict=True):
        assert line.startswith(f"Evaluation, {kind} actions, 10 episodes per seed: ")
        for result in ("episodic_return", "episodic_length", name):
            assert re.search(rf" {result} [\d.e+-]+ ± [\d.e+-]+", line), line
    assert lines[-1] == f"Results: {folder}"
    assert "Traceback" not in err and "Warning" not in err
    if script in CRAFTAX:
        with Image.open(folder / "achievements.png") as image:
            image.load()
        unlocked = [x for name, (x,) in evaluation["sampled"].items() if name.startswith("achievements/")]
        assert len(unlocked) == 2 and 0 < max(unlocked) <= 1 and min(unlocked) >= 0


@pytest.mark.parametrize("script", [*FIRST, "ppo_agalite_craftax", *OWN])
def test_killed_run_resumes_bit_for_bit(script, tmp_path):
    """A run that is killed in mid-episode and resumed (the first script's twice) ends with the same bits as an
    uninterrupted run. (test_ppo.py tests for each script that its checkpoints give every bit back.)"""
    updates = updates_of(script)
    kill_at = [updates // 8] + [updates // 2] * (script in FIRST)
    flags = ["--total-timesteps", updates * BATCH, "--checkpoint-interval", max(updates // 10, 1)]
    process = start(script, *flags, cwd=tmp_path)
    for row in kill_at:
        wait_for_row(process, tmp_path, row)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        out, _ = finish(process, expect=-signal.SIGKILL)
        folder = folder_of(tmp_path)
        assert f"Run folder: {folder}\nCompiling" in out and " parameters, " in out, "printed at once, also to a file"
        assert len(rows(folder)) < updates, "killed too late"
        assert not checkpoint(folder)["reset"].all(), "every episode had just ended"
        process = start(script, "--resume", folder, cwd=tmp_path, small=False)
    finish(process)
    assert_same_outcome(folder, run_to_its_end(script))
