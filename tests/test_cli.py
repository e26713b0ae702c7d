"""The command line, run as a user runs it from an empty folder: what a run leaves, and what it refuses."""

import dataclasses
import json
import math
import re
import shutil

import jax
import pytest
from cli import (
    BATCH,
    ENVIRONMENT,
    checkpoint,
    edited,
    finish,
    finished,
    folder_of,
    import_copy,
    rows,
    run,
    saved_args,
    small_flags,
    snapshot,
    start,
    steps,
)
from common import CRAFTAX, FIRST, MYSTERYPATH, SCRIPTS, TMAZE, load
from PIL import Image

COLUMNS = ["update", "seed", "global_step", "elapsed", "charts/SPS"]
COLUMNS += ["charts/episodic_return", "charts/episodic_length", "charts/episodes", "charts/learning_rate"]
COLUMNS += ["losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac"]
COLUMNS += ["losses/explained_variance", "losses/grad_norm"]


def check_metrics(folder, seeds: list[int], updates: int, outcome: str = "success_rate", low=0, high=1):
    """One row per update and seed, in order, all numbers finite, cells empty only where no episode ended, and an
    outcome from low to high."""
    table = rows(folder)
    assert {*COLUMNS, f"charts/{outcome}"} <= set(table[0])
    episodic = [name for name in table[0] if "episodic" in name or "achievements/" in name or outcome in name]
    expected = [(u, s, u * BATCH) for u in range(1, updates + 1) for s in seeds]
    assert [(int(row["update"]), int(row["seed"]), int(row["global_step"])) for row in table] == expected
    for row in table:
        for name in row:
            if name not in episodic:
                assert math.isfinite(float(row[name])), (name, row)
        ended = float(row["charts/episodes"]) > 0
        assert [name for name in episodic if (row[name] != "") != ended] == []
        assert not ended or low <= float(row[f"charts/{outcome}"]) <= high
    assert {float(row["charts/episodes"]) > 0 for row in table} == {True, False}, "the test must see both kinds"
    assert all(float(row["charts/SPS"]) > 0 for row in table)


@pytest.mark.parametrize("script", TMAZE + MYSTERYPATH)
def test_run_leaves_what_it_promises(script, tmp_path):
    """A run leaves arguments, metrics, checkpoints, curve, video and evaluation; the terminal tells how it went."""
    check_run(script, tmp_path, "success_rate", 0, 1)


CRAFTAX_RUNS = [(script, script != CRAFTAX[0]) for script in CRAFTAX]  # the first one plays the game itself


@pytest.mark.parametrize("script, stand_in", CRAFTAX_RUNS)
def test_run_of_craftax_leaves_what_it_promises(script, stand_in, tmp_path):
    """So does one of Craftax, with a chart of the achievements."""
    folder = check_run(script, tmp_path, "score", -5, 100, stand_in=stand_in)  # losing health costs a little
    with Image.open(folder / "achievements.png") as picture:
        picture.load()
    sampled = json.loads((folder / "evaluation.json").read_text())["sampled"]
    unlocked = [x for name, (x,) in sampled.items() if name.startswith("achievements/")]
    assert len(unlocked) == (2 if stand_in else 22) and 0 < max(unlocked) <= 1 and min(unlocked) >= 0


def check_run(script, tmp_path, outcome, low, high, **options):
    """Runs the script -> its folder, with all in it that a run of any script leaves."""
    flags = ["--total-timesteps", "1e3", "--capture-video", "--track"]
    out, err = run(script, *flags, cwd=tmp_path, **options)
    folder = folder_of(tmp_path)
    assert folder.name.split("__")[1:3] == [script, "1"]
    args = saved_args(folder)
    assert args["total_timesteps"] == 1000 and args["num_envs"] * args["num_steps"] == BATCH
    check_metrics(folder, [1], 1000 // BATCH, outcome, low, high)
    assert steps(folder)[-1] == 1000 // BATCH
    with Image.open(folder / "learning_curve.png") as picture:
        picture.load()
        assert min(picture.size) > 100
    with Image.open(folder / "episode.gif") as video:
        assert video.n_frames > 1
    evaluation = json.loads((folder / "evaluation.json").read_text())
    name = outcome.removesuffix("_rate")
    for kind in ("sampled", "greedy"):
        assert len(evaluation[kind][name]) == 1 and low <= evaluation[kind][name][0] <= high
        assert evaluation[kind]["episodic_length"][0] >= 1
    assert list((folder / "wandb").rglob("*.wandb")), "--track, offline, keeps a record"
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}, "nothing outside runs/"

    lines = out.splitlines()
    assert lines[0] == f"Run folder: {folder}" and lines[1].startswith("Compiling"), "said before it takes long"
    size = sum(x[0].size for x in jax.tree.leaves(checkpoint(folder)["train_state"]["params"]))
    assert lines[2] == f"{size:,} parameters, {1000 // BATCH} updates of {BATCH} steps"
    assert "step/s" in err and "episodic_return=" in err and f"{outcome}=" in err
    for line, kind in zip(lines[3:5], ("sampled", "greedy"), strict=True):
        assert line.startswith(f"Evaluation, {kind} actions, 20 episodes per seed: ")
        for result in ("episodic_return", "episodic_length", name):
            assert re.search(rf" {result} [\d.e+-]+ ± [\d.e+-]+", line), line
    assert lines[-1] == f"Results: {folder}"
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


# Flags, and what the one sentence must name: the value, and the rule or the way out. Asked of the scripts that have the
# first flag.
REFUSED = [
    ("--num-envs 8 --num-minibatches 3", "--num-envs 8", "not divisible by --num-minibatches 3"),
    ("--num-envs 0", "--num-envs 0", "must be at least 1"),
    ("--num-seeds 0", "--num-seeds 0", "must be at least 1"),
    ("--total-timesteps 10", "--total-timesteps 10", "must be at least"),  # less than one update
    ("--total-timesteps inf", "--total-timesteps inf", "must be at most"),
    ("--total-timesteps abc", "--total-timesteps", "abc"),
    ("--learning-rate nan", "--learning-rate nan", "must be"),
    ("--learning-rate inf", "--learning-rate inf", "must be at most"),
    ("--learning-rate -1", "--learning-rate -1", "must be at least 0"),
    ("--critic-lambda 1.5", "--critic-lambda 1.5", "must be at most 1"),
    ("--gamma 1.5", "--gamma 1.5", "must be at most 1"),
    ("--gae-lambda -0.1", "--gae-lambda -0.1", "must be at least 0"),
    ("--clip-coef -1", "--clip-coef -1", "must be at least 0"),
    ("--seed -1", "--seed -1", "must be at least 0"),
    ("--seed 4294967296", "--seed 4294967296", "must be at most"),
    ("--no-such-flag 3", "--no-such-flag", "nrecognized"),
    ("--resume nowhere", "nowhere", "not the folder of a run"),
    ("--evaluate nowhere", "nowhere", "not the folder of a run"),
    ("--corridor-len 1", "corridor_len 1", "at least 2"),
    ("--corridor-len 300", "corridor_len 300", "8-bit Gray code, so at most 256"),
    ("--corridor-len -5", "corridor_len -5", "at least 2"),
    ("--corridor-len abc", "--corridor-len", "abc"),
    ("--max-episode-steps 19 --corridor-len 20", "max_episode_steps 19", "at least 20"),
    ("--num-distractors -1", "num_distractors -1", "at least 0"),
    ("--env-id Nothing-v9", "env_id Nothing-v9", "-v"),
    ("--optimistic-reset-ratio 24", "not divisible by", "24"),
    ("--optimistic-reset-ratio 0", "0", "not divisible by 0"),
    ("--chrono-steps 0.5", "--chrono-steps 0.5", "must be at least 1"),
    ("--num-layers 0", "--num-layers 0", "must be at least 1"),
    ("--r 0", "--r 0", "must be at least 1"),
    ("--eta 0", "--eta 0", "must be at least 1"),
    ("--memory-len 0", "--memory-len 0", "must be at least 1"),
    ("--hidden-size 0", "--hidden-size 0", "must be at least 1"),
    ("--d-model 7 --memory-len 5", "--d-model 7", "even"),
]


def refused_of(script: str) -> list[tuple]:
    fields = {field.name for field in dataclasses.fields(load(script).Args)}
    flags_of = lambda flags: {flag[2:].replace("-", "_") for flag in flags.split() if flag.startswith("--")}
    return [case for case in REFUSED if flags_of(case[0]) <= fields | {"no_such_flag"}]


def refusal(script: str, argv: list[str], capsys) -> str:
    """What parse_args says as it refuses, as one line."""
    with pytest.raises(SystemExit) as refused:
        load(script).parse_args(argv)
    assert refused.value.code not in (0, None)
    said = capsys.readouterr().err + (refused.value.code if isinstance(refused.value.code, str) else "")
    assert "Traceback" not in said
    return " ".join(said.replace("│", " ").split())


@pytest.mark.parametrize(
    "script, flags, value, rule", [(script, *case) for script in SCRIPTS for case in refused_of(script)]
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


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_flag_that_a_user_adds_is_not_refused(name, tmp_path):
    """A new flag may have the default 0, a negative one, text or none at all, and any value."""
    field = "    # PPO"
    new = [
        "dropout: float = 0.0  # mine", "penalty: float = -1.5  # mine", "depth: int = 0  # mine",
        'kind: str = ""  # mine', "limit: float | None = None  # mine",
    ]  # fmt: skip
    text = (load(name).__spec__.loader.get_source(name)).split("\n")
    place = next(i for i, line in enumerate(text) if line.startswith(field))
    path = tmp_path / f"{name}.py"
    path.write_text("\n".join(text[:place] + [f"    {line}" for line in new] + text[place:]))
    script = import_copy(path)
    args = script.parse_args([])
    assert (args.dropout, args.penalty, args.depth, args.kind, args.limit) == (0, -1.5, 0, "", None)
    args = script.parse_args("--dropout 0 --penalty -2.5 --depth -3 --kind x --limit -1e9".split())
    assert (args.dropout, args.penalty, args.depth, args.kind, args.limit) == (0, -2.5, -3, "x", -1e9)


@pytest.mark.parametrize("script", FIRST)
def test_resume_checks_the_folder(script, tmp_path, capsys):
    """--resume refuses folders without a run and flags that differ from the run's, naming both values."""
    assert "not the folder of a run" in refusal(script, ["--resume", str(tmp_path)], capsys)
    (tmp_path / "args.json").write_text("{")  # as a full disk leaves it
    assert str(tmp_path) in refusal(script, ["--resume", str(tmp_path)], capsys)
    (tmp_path / "args.json").write_text('{"hidden_states": 5}')  # of another script
    said = refusal(script, ["--evaluate", str(tmp_path)], capsys)
    assert "not the folder of a run of this script" in said and "hidden_states" in said

    folder = str(finished(script))
    said = refusal(script, ["--resume", folder, "--gamma", "0.5"], capsys)
    assert "--gamma" in said and "0.5" in said and "0.99" in said and folder in said
    assert "--evaluate" in refusal(script, ["--resume", folder, "--evaluate", folder], capsys)
    args = load(script).parse_args(["--resume", folder, "--gamma", "0.99", "--eval-episodes", "7", "--track"])
    assert args.gamma == 0.99 and args.num_envs * args.num_steps == BATCH
    assert args.eval_episodes == 7 and args.track, "what does not touch the computation may change"


@pytest.mark.parametrize("script", FIRST)
def test_resume_judges_flags_by_the_run_not_by_the_defaults(script):
    """Beside --resume a flag needs to fit the run's other arguments, not the defaults."""
    few = 3 * BATCH  # less than one update with the default sizes
    args = load(script).parse_args(["--resume", str(finished(script)), "--total-timesteps", str(few)])
    assert args.total_timesteps == few and args.num_updates == 3


@pytest.mark.parametrize("script", FIRST)
def test_annealed_run_cannot_be_extended(script, tmp_path, capsys):
    """With --anneal-lr the length of a run is part of the computation, so --resume refuses another."""
    args = load(script).parse_args(small_flags(script) + ["--anneal-lr", "--total-timesteps", "6400"])
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    said = refusal(script, ["--resume", str(tmp_path), "--total-timesteps", "128000"], capsys)
    assert "--total-timesteps" in said and "128000" in said and "6400" in said


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
    assert "Evaluation, sampled actions" in out


@pytest.mark.parametrize("script", FIRST)
def test_finished_run_can_be_extended(script, tmp_path):
    """--resume with more --total-timesteps goes on where a finished run ended, keeps its rows, and the clock goes on.
    A copy of the script in which a metric has another name leaves both columns."""
    folder = tmp_path / "run"
    shutil.copytree(finished(script), folder)
    before = rows(folder)
    renamed = edited(script, tmp_path, ('"losses/entropy": entropy', '"losses/entropy_of_policy": entropy'))
    run(script, "--resume", folder, "--total-timesteps", 220 * BATCH, cwd=tmp_path, small=False, path=renamed)
    after = rows(folder)
    assert [row | {"losses/entropy_of_policy": ""} for row in before] == after[:200]
    assert all(row["losses/entropy"] == "" and float(row["losses/entropy_of_policy"]) > 0 for row in after[200:])
    elapsed = [float(row["elapsed"]) for row in after]
    assert elapsed == sorted(elapsed) and elapsed[200] > elapsed[199] >= elapsed[0] > 0
    assert [int(row["update"]) for row in after] == list(range(1, 221))
    assert steps(folder)[-1] == 220


@pytest.mark.parametrize("script", FIRST)
def test_runs_started_together_have_folders_of_their_own(script, tmp_path):
    """Two runs of one seed that start at the same moment do not share a folder."""
    for process in [start(script, "--total-timesteps", BATCH, cwd=tmp_path) for _ in range(2)]:
        finish(process)
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2 and all(len(rows(folder)) == 1 and steps(folder) == [1] for folder in folders)


@pytest.mark.parametrize("script", FIRST)
def test_switches_of_jax(script, tmp_path):
    """No NaN is made on purpose, and everything also works in 64 bits."""
    switches = ENVIRONMENT | {"JAX_DEBUG_NANS": "1", "JAX_ENABLE_X64": "1"}
    run(script, "--total-timesteps", 2 * BATCH, cwd=tmp_path, env=switches)
    assert len(rows(folder_of(tmp_path))) == 2
