"""The command line, run as a user runs it from an empty folder: what a run leaves, and what it refuses."""

import dataclasses
import json
import math
import shutil

import jax
import pytest
from cli import BATCH, SMALL_FLAGS, checkpoint, finished, folder_of, rows, run, saved_args, snapshot, steps
from common import CRAFTAX, FIRST, MYSTERYPATH, SCRIPTS, TMAZE, load
from PIL import Image

COLUMNS = ["update", "seed", "global_step", "elapsed", "charts/SPS"]
COLUMNS += ["charts/episodic_return", "charts/episodic_length", "charts/episodes", "charts/learning_rate"]
COLUMNS += ["losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac"]
COLUMNS += ["losses/explained_variance", "losses/grad_norm"]


def check_metrics(folder, seeds: list[int], updates: int, outcome: str = "success_rate", limit: int = 1):
    """One row an update and seed, in order, all numbers finite, cells empty just where no episode ended, and an outcome
    of at most `limit`."""
    table = rows(folder)
    assert {*COLUMNS, f"charts/{outcome}"} <= set(table[0])
    episodic = [name for name in table[0] if "episodic" in name or "achievements/" in name or outcome in name]
    expected = [(u, s, u * BATCH) for u in range(1, updates + 1) for s in seeds]
    assert [(int(row["update"]), int(row["seed"]), int(row["global_step"])) for row in table] == expected
    for row in table:
        for name in row:
            if name not in (*episodic, "losses/explained_variance"):
                assert math.isfinite(float(row[name])), (name, row)
        ended = float(row["charts/episodes"]) > 0
        assert [name for name in episodic if (row[name] != "") != ended] == []
        assert not ended or 0 <= float(row[f"charts/{outcome}"]) <= limit
    assert {float(row["charts/episodes"]) > 0 for row in table} == {True, False}, "the test must see both kinds"
    assert all(float(row["charts/SPS"]) > 0 for row in table)


@pytest.mark.parametrize("script", TMAZE + MYSTERYPATH)
def test_run_leaves_what_it_promises(script, tmp_path):
    """A run leaves arguments, metrics, checkpoints, curve, video and evaluation; the terminal tells how it went."""
    check_run(script, tmp_path, "success_rate", 1)


@pytest.mark.parametrize("script, stand_in", [(CRAFTAX[0], False), (CRAFTAX[1], True)])
def test_run_of_craftax_leaves_what_it_promises(script, stand_in, tmp_path):
    """So does one of Craftax, where a picture tells the achievements. One run here is of the game itself."""
    folder = check_run(script, tmp_path, "score", 100, stand_in=stand_in)
    with Image.open(folder / "achievements.png") as picture:
        picture.load()
    sampled = json.loads((folder / "evaluation.json").read_text())["sampled"]
    unlocked = [x for name, (x,) in sampled.items() if name.startswith("achievements/")]
    assert len(unlocked) == (2 if stand_in else 22) and 0 < max(unlocked) <= 1 and min(unlocked) >= 0


def check_run(script, tmp_path, outcome, limit, **options):
    """Runs the script -> its folder, with all in it that a run of any script leaves."""
    flags = ["--total-timesteps", "1e3", "--capture-video", "--track"]
    out, err = run(script, *flags, cwd=tmp_path, **options)
    folder = folder_of(tmp_path)
    assert folder.name.split("__")[1:3] == [script, "1"]
    args = saved_args(folder)
    assert args["total_timesteps"] == 1000 and args["num_envs"] * args["num_steps"] == BATCH
    check_metrics(folder, [1], 1000 // BATCH, outcome, limit)
    assert steps(folder)[-1] == 1000 // BATCH
    with Image.open(folder / "learning_curve.png") as picture:
        picture.load()
        assert min(picture.size) > 100
    with Image.open(next((folder / "videos").glob("*.gif"))) as video:
        assert video.n_frames > 1
    evaluation = json.loads((folder / "evaluation.json").read_text())
    name = outcome.removesuffix("_rate")
    for kind in ("sampled", "greedy"):
        assert len(evaluation[kind][name]) == 1 and 0 <= evaluation[kind][name][0] <= limit
        assert evaluation[kind]["episodic_length"][0] >= 1
    assert list((folder / "wandb").rglob("*.wandb")), "--track, offline, keeps a record"
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}, "nothing outside runs/"

    size = sum(x[0].size for x in jax.tree.leaves(checkpoint(folder)["runner"]["learner"]["params"]))
    assert f"{size:,} parameters" in out
    assert "step/s" in err and "return=" in err and f"{name}=" in err
    assert "evaluation with sampled actions, 20 episodes: length " in out and str(folder) in out.splitlines()[-1]
    assert "Traceback" not in err and "Warning" not in err
    return folder


@pytest.mark.parametrize("script", FIRST)
def test_several_seeds_have_rows_each(script, tmp_path):
    """--num-seeds 2 leaves a row an update and seed, and the seeds differ."""
    run(script, "--num-seeds", 2, "--seed", 3, "--total-timesteps", 12 * BATCH, cwd=tmp_path)
    folder = folder_of(tmp_path)
    check_metrics(folder, [3, 4], 12)
    first = [row["losses/value_loss"] for row in rows(folder)]
    assert all(a != b for a, b in zip(first[::2], first[1::2], strict=True))
    assert len(json.loads((folder / "evaluation.json").read_text())["sampled"]["success"]) == 2


# Flags, and what the one sentence must name: the value, and the rule or the way out.
REFUSED_BY_ALL = [
    ("--num-envs 8 --num-minibatches 3", "--num-envs 8", "not divisible by --num-minibatches 3"),
    ("--num-envs 0", "--num-envs 0", "at least 1"),
    ("--num-seeds 0", "--num-seeds 0", "at least 1"),
    ("--total-timesteps 10", "--total-timesteps 10", "less than one update"),
    ("--total-timesteps 1.5e0", "1.5e0", "not a whole number"),
    ("--total-timesteps inf", "inf", "not a whole number"),
    ("--total-timesteps abc", "--total-timesteps", "abc"),
    ("--learning-rate nan", "--learning-rate nan", "finite"),
    ("--learning-rate inf", "--learning-rate inf", "finite"),
    ("--learning-rate -1", "--learning-rate -1", "at least 0"),
    ("--learning-rate 0", "--learning-rate 0", "above 0"),
    ("--logit-noise -1", "--logit-noise -1", "at least 0"),
    ("--cautious-entropy -1", "--cautious-entropy -1", "at least 0"),
    ("--critic-lambda 1.5", "--critic-lambda 1.5", "at most 1"),
    ("--gamma 1.5", "--gamma 1.5", "at most 1"),
    ("--gae-lambda -0.1", "--gae-lambda -0.1", "at least 0"),
    ("--clip-coef 0", "--clip-coef 0", "above 0"),
    ("--seed -1", "--seed -1", "at least 0"),
    ("--seed 4294967296", "--seed 4294967296", "below 2^31"),
    ("--no-such-flag 3", "--no-such-flag", "nrecognized"),
    ("--exp-name a/b", "--exp-name a/b", "folder"),
    ("--resume nowhere", "nowhere", "not the folder of a run"),
    ("--evaluate nowhere", "nowhere", "not the folder of a run"),
]
TMAZE_FLAGS = [
    ("--corridor-len 1", "--corridor-len 1", "at least 2"),
    ("--corridor-len 300", "--corridor-len 300", "8-bit Gray code, so at most 256"),
    ("--corridor-len -5", "--corridor-len -5", "at least 2"),
    ("--corridor-len abc", "--corridor-len", "abc"),
    ("--corridor-len 20 --max-episode-steps 19", "--max-episode-steps 19", "at least 20"),
    ("--num-distractors -1", "--num-distractors -1", "at least 0"),
    ("--critic-bias nan", "--critic-bias nan", "finite"),
]
MYSTERYPATH_FLAGS = [
    ("--env-id MysteryPath-v9", "--env-id MysteryPath-v9", "MysteryPath-Grid-Easy-v0"),
    ("--corridor-len 20", "--corridor-len", "nrecognized"),
]
CRAFTAX_FLAGS = [
    ("--env-id Craftax-v9", "--env-id Craftax-v9", "Craftax-Classic-Symbolic-v1"),
    ("--num-envs 24", "--num-envs 24", "not divisible by --optimistic-reset-ratio 16"),
    ("--optimistic-reset-ratio 0", "--optimistic-reset-ratio 0", "at least 1"),
]
CHRONO = [
    ("--gate-init foo", "foo", "chrono"),
    ("--chrono-t-max 1", "--chrono-t-max 1", "above 1"),
]
LAYERS = [
    ("--num-layers 0", "--num-layers 0", "at least 1"),
]
WINDOW = [
    ("--memory-len 0", "--memory-len 0", "at least 1"),
    ("--d-model 7", "--d-model 7", "even"),
]
REFUSED = {
    "ppo_agalite_tmaze": [*TMAZE_FLAGS, *CHRONO, *LAYERS, ("--r 0", "--r 0", "at least 1")],
    "ppo_galite_tmaze": [*TMAZE_FLAGS, *CHRONO, *LAYERS, ("--eta 0", "--eta 0", "at least 1")],
    "ppo_gtrxl_tmaze": [*TMAZE_FLAGS, *LAYERS, *WINDOW],
    "ppo_lstm_tmaze": [*TMAZE_FLAGS, *CHRONO, ("--hidden-size 0", "--hidden-size 0", "at least 1")],
    "ppo_gru_tmaze": [*TMAZE_FLAGS, *CHRONO, ("--hidden-size 0", "--hidden-size 0", "at least 1")],
    "ppo_agalite_mysterypath": [*MYSTERYPATH_FLAGS, *CHRONO, *LAYERS, ("--r 0", "--r 0", "at least 1")],
    "ppo_gtrxl_mysterypath": [*MYSTERYPATH_FLAGS, *LAYERS, *WINDOW],
    "ppo_agalite_craftax": [*CRAFTAX_FLAGS, *CHRONO, *LAYERS, ("--r 0", "--r 0", "at least 1")],
    "ppo_gtrxl_craftax": [*CRAFTAX_FLAGS, *LAYERS, *WINDOW],
}


def refusal(script: str, argv: list[str], capsys) -> str:
    """What parse_args says as it refuses, as one line."""
    with pytest.raises(SystemExit) as refused:
        load(script).parse_args(argv)
    assert refused.value.code not in (0, None)
    said = capsys.readouterr().err + (refused.value.code if isinstance(refused.value.code, str) else "")
    assert "Traceback" not in said
    return " ".join(said.replace("│", " ").split())


@pytest.mark.parametrize(
    "script, flags, value, rule", [(s, *case) for s in SCRIPTS for case in REFUSED_BY_ALL + REFUSED[s]]
)
def test_impossible_arguments_are_refused(script, flags, value, rule, capsys):
    """An argument that cannot work is refused with its value and the rule."""
    said = refusal(script, flags.split(), capsys)
    assert value in said and rule in said, said


@pytest.mark.parametrize("script", FIRST)
def test_refusal_comes_before_anything_else(script, tmp_path):
    """A refused command exits non-zero at once, without a traceback, and leaves no folder."""
    out, err = run(script, "--num-minibatches", 3, cwd=tmp_path, expect=2)
    assert "--num-minibatches 3" in err and "Traceback" not in err and out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", FIRST)
def test_resume_checks_the_folder(script, tmp_path, capsys):
    """--resume refuses folders without a run and flags that differ from the run's, naming both values."""
    assert "not the folder of a run" in refusal(script, ["--resume", str(tmp_path)], capsys)
    (tmp_path / "args.json").write_text("{")  # as a full disk leaves it
    assert str(tmp_path) in refusal(script, ["--resume", str(tmp_path)], capsys)

    folder = str(finished(script))
    said = refusal(script, ["--resume", folder, "--gamma", "0.5"], capsys)
    assert "--gamma 0.5" in said and "--gamma 0.99" in said
    assert "--evaluate" in refusal(script, ["--resume", folder, "--evaluate", folder], capsys)
    args = load(script).parse_args(["--resume", folder, "--gamma", "0.99"])
    assert args.gamma == 0.99 and args.num_envs * args.num_steps == BATCH


@pytest.mark.parametrize("script", FIRST)
def test_resume_judges_flags_by_the_run_not_by_the_defaults(script):
    """Beside --resume a flag needs to fit the run's other arguments, not the defaults."""
    few = 3 * BATCH  # less than one update with the default sizes
    args = load(script).parse_args(["--resume", str(finished(script)), "--total-timesteps", str(few)])
    assert args.total_timesteps == few


@pytest.mark.parametrize("script", FIRST)
def test_annealed_run_cannot_be_extended(script, tmp_path, capsys):
    """With --anneal-lr the length of a run is part of the computation, so --resume refuses another."""
    args = load(script).parse_args(SMALL_FLAGS[script].split() + ["--anneal-lr", "--total-timesteps", "6400"])
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    said = refusal(script, ["--resume", str(tmp_path), "--total-timesteps", "12800"], capsys)
    assert "--total-timesteps 12800" in said and "6400, to whose end its learning rate falls" in said


@pytest.mark.parametrize("script", FIRST)
def test_evaluate_only_evaluates(script, tmp_path):
    """--evaluate leaves checkpoints, metrics and arguments as they are and evaluates again, to the same result."""
    folder = tmp_path / "run"
    shutil.copytree(finished(script), folder)
    (folder / "evaluation.json").unlink()
    before = snapshot(folder)
    out, _ = run(script, "--evaluate", folder, cwd=tmp_path, small=False)
    after = snapshot(folder)
    assert {name for name in after if after[name] != before.get(name)} <= {"learning_curve.png", "evaluation.json"}
    assert set(after) == set(before) | {"evaluation.json"}
    assert after["evaluation.json"] == (finished(script) / "evaluation.json").read_bytes()
    assert "evaluation with sampled actions" in out


@pytest.mark.parametrize("script", FIRST)
def test_finished_run_can_be_extended(script, tmp_path):
    """--resume with more --total-timesteps goes on where a finished run ended, and keeps its rows."""
    folder = tmp_path / "run"
    shutil.copytree(finished(script), folder)
    before = rows(folder)
    run(script, "--resume", folder, "--total-timesteps", 220 * BATCH, cwd=tmp_path, small=False)
    assert rows(folder)[: len(before)] == before
    check_metrics(folder, [1], 220)
    assert steps(folder)[-1] == 220
