"""The command line as a user runs it, from an empty folder: what a run leaves, and what it refuses."""

import dataclasses
import inspect
import json
import math
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sync
import wandb
from cli import (
    BATCH,
    ENVIRONMENT,
    checkpoint,
    edited,
    finished,
    folder_of,
    import_copy,
    refusal,
    rows,
    run,
    saved_args,
    small_flags,
    snapshot,
    steps,
)
from common import FIRST, MEMORYMAZE, SCRIPTS, TMAZE, load, quick_jit, small_args, tiny_args

# Flags, and what the error message must name: the value, and the rule or the way out. For scripts that have the flags.
REFUSED = [
    ("--num-envs 8 --num-minibatches 3", "--num-envs 8", "not divisible by --num-minibatches 3"),
    ("--num-envs 0", "--num-envs 0", "must be at least 1"),
    ("--num-seeds 0", "--num-seeds 0", "must be at least 1"),
    ("--total-timesteps 10", "--total-timesteps 10", "must be at least"),  # less than one update
    ("--total-timesteps inf", "--total-timesteps inf", "must be at most"),
    ("--learning-rate nan", "--learning-rate nan", "must be"),
    ("--learning-rate inf", "--learning-rate inf", "must be at most"),
    ("--learning-rate -1", "--learning-rate -1", "must be at least 0"),
    ("--critic-lambda 1.5", "--critic-lambda 1.5", "must be at most 1"),
    ("--gamma 1.5", "--gamma 1.5", "must be at most 1"),
    ("--gae-lambda -0.1", "--gae-lambda -0.1", "must be at least 0"),
    ("--clip-coef -1", "--clip-coef -1", "must be at least 0"),
    ("--seed -1", "--seed -1", "must be at least 0"),
    ("--seed 4294967296", "--seed 4294967296", "must be at most"),
    ("--corridor-len 1", "corridor_len 1", "at least 2"),
    ("--corridor-len 300", "corridor_len 300", "8-bit Gray code, so at most 256"),
    ("--corridor-len -5", "corridor_len -5", "at least 2"),
    ("--max-episode-steps 19 --corridor-len 20", "max_episode_steps 19", "at least 20"),
    ("--num-distractors -1", "num_distractors -1", "at least 0"),
    ("--env-id Nothing-v9", "env_id Nothing-v9", "there are"),
    ("--optimistic-reset-ratio 24", "optimistic_reset_ratio 24", "must divide num_envs"),
    ("--optimistic-reset-ratio 0", "optimistic_reset_ratio 0", "must divide num_envs"),
    ("--chrono-steps 0.5", "--chrono-steps 0.5", "must be at least 1"),
    ("--num-layers 0", "--num-layers 0", "must be at least 1"),
    ("--r 0", "--r 0", "must be at least 1"),
    ("--eta 0", "--eta 0", "must be at least 1"),
    ("--memory-len 0", "--memory-len 0", "must be at least 1"),
    ("--hidden-size 0", "--hidden-size 0", "must be at least 1"),
    ("--d-model 7 --memory-len 5", "--d-model 7", "even"),
]
# The same, but refused before Args sees them.
UNREADABLE = [
    ("--total-timesteps abc", "--total-timesteps", "abc"),
    ("--no-such-flag 3", "--no-such-flag", "nrecognized"),
    ("--resume nowhere", "nowhere", "not the folder of a run"),
    ("--evaluate nowhere", "nowhere", "not the folder of a run"),
    ("--corridor-len abc", "--corridor-len", "abc"),
]


def refused_of(script: str, cases: list[tuple]) -> list[tuple]:
    """The cases whose flags the script has."""
    fields = {field.name for field in dataclasses.fields(load(script).Args)}
    flags_of = lambda flags: {flag[2:].replace("-", "_") for flag in flags.split() if flag.startswith("--")}
    return [case for case in cases if flags_of(case[0]) <= fields | {"no_such_flag"}]


EACH_ONCE = {case: (script, *case) for script in reversed(SCRIPTS) for case in refused_of(script, REFUSED + UNREADABLE)}
assert EACH_ONCE.keys() == {*REFUSED, *UNREADABLE}, "a case that no script has"


@pytest.mark.parametrize("script, flags, value, rule", EACH_ONCE.values())
def test_impossible_arguments_are_refused(script, flags, value, rule, capsys):
    """The first script that has the flag refuses an impossible argument, and names its value and the rule."""
    sentence = refusal(script, flags.split(), capsys)
    assert value in sentence and rule in sentence, sentence


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_refuses_impossible_arguments(name):
    """All scripts that have a field refuse the same values of it. The parser is the same text."""
    script, cases = load(name), refused_of(name, REFUSED)
    assert len(cases) > 15
    for flags, value, rule in cases:
        words = flags.split()
        fields = {flag[2:].replace("-", "_"): x for flag, x in zip(words[::2], words[1::2], strict=True)}
        kinds = {field.name: field.type for field in dataclasses.fields(script.Args)}
        with pytest.raises(ValueError) as refused:
            script.Args(**{field: kinds[field](x) for field, x in fields.items()})
        assert value in str(refused.value) and rule in str(refused.value), refused.value


def fields_of_ours(script) -> list[dataclasses.Field]:
    """The fields of its Args that one of the project's scripts has; those that a user added may have any value."""
    ours = [load(Path(path).stem).Args for path in sync.PROJECT]
    known = {field.name for args in ours for field in dataclasses.fields(args)}
    return [field for field in dataclasses.fields(script.Args) if field.name in known]


@pytest.mark.parametrize("name", SCRIPTS + MEMORYMAZE)
def test_every_size_and_rate_is_checked(name):
    """A size of 0, a negative rate and a number that is none are refused, whatever the field of ours."""
    script = load(name)
    for field in fields_of_ours(script):
        wrong = {int: [-1, *[0] * (field.name not in ("seed", "num_distractors"))], float: [-1.0, math.nan]}
        for value in wrong.get(field.type, []) if field.name != "initial_value" else []:
            with pytest.raises(ValueError, match=f"{field.name}|{field.name.replace('_', '-')}"):
                script.Args(**{field.name: value})


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_resumed_run_may_change(name, tmp_path):
    """Flags that usage.md names may change, and total_timesteps without an annealed learning rate. No other may."""
    script = load(name)
    changes = {int: lambda x: 2 * x, float: lambda x: x / 2, bool: lambda x: not x, str: lambda x: f"{x}_"}
    free = {"resume", "checkpoint_interval", "eval_episodes", "capture_video", "track", "distributed"}
    fields = fields_of_ours(script)
    chrono_steps = {"chrono_steps": 4.0} if "chrono_steps" in [field.name for field in fields] else {}
    for anneal_lr in (True, False):
        args = small_args(script, anneal_lr=anneal_lr, total_timesteps=5120, **chrono_steps)
        (tmp_path / "args.json").write_text(json.dumps(vars(args)))
        for field in fields:
            if field.name in ("resume", "env_id"):  # the folder itself; a name that does not exist is refused as such
                continue
            value, flag = changes[field.type](getattr(args, field.name)), field.name.replace("_", "-")
            words = [f"--{flag}" if value else f"--no-{flag}"] if field.type is bool else [f"--{flag}={value}"]
            resume = lambda words=words: script.parse_args(["--resume", str(tmp_path), *words])
            if field.name in free or (field.name == "total_timesteps" and not anneal_lr):
                assert getattr(resume(), field.name) == value
            else:
                with pytest.raises(SystemExit, match=f"^--{flag} is .* cannot be"):
                    resume()


@pytest.mark.parametrize("script", FIRST)
def test_refusal_comes_before_anything_else(script, tmp_path):
    """A refused command exits non-zero at once, without a traceback, and leaves no folder."""
    out, err = run(script, "--num-minibatches", 3, cwd=tmp_path, expect=2)
    assert "--num-minibatches 3" in err and "Traceback" not in err and out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_flag_that_a_user_adds_is_not_refused(name, tmp_path):
    """A new flag may have 0, a negative number, text or None as its default, and any value."""
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


@pytest.mark.slow
@pytest.mark.parametrize("script", FIRST)
def test_resume_checks_the_folder(script, tmp_path, capsys):
    """--resume refuses folders without a run, and flags that differ from the run's. It names both values."""
    assert "not the folder of a run" in refusal(script, ["--resume", str(tmp_path)], capsys)
    (tmp_path / "args.json").write_text("{")  # as a full disk leaves it
    assert str(tmp_path) in refusal(script, ["--resume", str(tmp_path)], capsys)
    (tmp_path / "args.json").write_text('{"hidden_states": 5}')  # of another script
    sentence = refusal(script, ["--evaluate", str(tmp_path)], capsys)
    assert "not the folder of a run of this script" in sentence and "hidden_states" in sentence

    folder = str(finished(script))
    sentence = refusal(script, ["--resume", folder, "--gamma", "0.5"], capsys)
    assert "--gamma" in sentence and "0.5" in sentence and "0.99" in sentence and folder in sentence
    assert "--evaluate is '' in" in refusal(script, ["--resume", folder, "--evaluate", folder], capsys)
    args = load(script).parse_args(["--resume", folder, "--gamma", "0.99", "--eval-episodes", "7", "--track"])
    assert args.gamma == 0.99 and args.num_envs * args.num_steps == BATCH
    assert args.eval_episodes == 7 and args.track, "what does not affect the computation may change"


@pytest.mark.slow
@pytest.mark.parametrize("script", FIRST)
def test_resume_judges_flags_by_the_run_not_by_the_defaults(script):
    """With --resume, a flag must fit the run's other arguments, not the defaults."""
    few = 3 * BATCH  # less than one update with the default sizes
    args = load(script).parse_args(["--resume", str(finished(script)), "--total-timesteps", str(few)])
    assert args.total_timesteps == few and args.num_updates == 3


@pytest.mark.parametrize("script", FIRST)
def test_annealed_run_cannot_be_extended(script, tmp_path, capsys):
    """With --anneal-lr, the length of a run is part of the computation, so --resume refuses another one."""
    args = load(script).parse_args(small_flags(script) + ["--anneal-lr", "--total-timesteps", "6400"])
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    sentence = refusal(script, ["--resume", str(tmp_path), "--total-timesteps", "128000"], capsys)
    assert "--total-timesteps" in sentence and "128000" in sentence and "6400" in sentence


@pytest.mark.slow
@pytest.mark.parametrize("script", FIRST)
def test_evaluate_only_evaluates(script, tmp_path):
    """--evaluate leaves checkpoints, metrics and arguments unchanged, and evaluates again to the same result."""
    folder = tmp_path / "run"
    shutil.copytree(finished(script), folder)
    (folder / "evaluation.json").unlink()
    before = snapshot(folder)
    out, _ = run(script, "--evaluate", "run", cwd=tmp_path, small=False)  # a relative path, as users type it
    after = snapshot(folder)
    assert {name for name in after if after[name] != before.get(name)} <= {"learning_curve.png", "evaluation.json"}
    assert set(after) == set(before) | {"evaluation.json"}
    assert after["evaluation.json"] == (finished(script) / "evaluation.json").read_bytes()
    assert "Evaluation, sampled actions" in out
    # In a longer corridor: the limit of 40 steps is the shortest path, so all episodes have this length. The arguments
    # and the checkpoints are all that an evaluation needs.
    (folder / "metrics.csv").unlink()
    flags = "--eval-episodes", 1, "--corridor-len", 40, "--capture-video"
    out, err = run(script, "--evaluate", folder, *flags, cwd=tmp_path, small=False)
    assert "1 episodes" in out and "±" not in out and "Warning" not in err, "one episode has no interval"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["sampled"]["episodic_length"] == [40] and (folder / "episode.gif").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", FIRST)
def test_finished_run_can_be_extended(script, tmp_path):
    """--resume with more --total-timesteps continues a finished run, keeps its rows, and continues the clock. If a copy
    of the script renames a metric, both columns stay; if it adds a flag, args.json has it. The devices may change: here
    to two of three, because a minibatch has two environments."""
    folder = tmp_path / "run"
    shutil.copytree(finished(script), folder)
    before = rows(folder)
    renamed = '"losses/entropy": entropy', '"losses/entropy_of_policy": entropy'
    added = "    # The model\n", "    # The model\n    wind: float = 0.5\n"
    copy = edited(script, tmp_path, renamed, added)
    three = ENVIRONMENT | {"XLA_FLAGS": ENVIRONMENT["XLA_FLAGS"] + " --xla_force_host_platform_device_count=3"}
    flags = "--resume", folder, "--total-timesteps", 220 * BATCH
    out, _ = run(script, *flags, cwd=tmp_path, small=False, path=copy, env=three)
    assert "Using 2 of 3 devices" in out
    after = rows(folder)
    assert [row | {"losses/entropy_of_policy": ""} for row in before] == after[:200]
    assert all(row["losses/entropy"] == "" and float(row["losses/entropy_of_policy"]) > 0 for row in after[200:])
    elapsed = [float(row["elapsed"]) for row in after]
    assert elapsed == sorted(elapsed) and elapsed[200] > elapsed[199] >= elapsed[0] > 0
    assert [int(row["update"]) for row in after] == list(range(1, 221))
    assert steps(folder)[-1] == 220
    expected = saved_args(finished(script)) | {"total_timesteps": 220 * BATCH, "wind": 0.5}
    assert saved_args(folder) == expected, "so --resume continues with the new length and flag if it is interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("script", FIRST)
def test_switches_of_jax(script, tmp_path):
    """A run never computes NaN, and also works in 64 bits."""
    switches = ENVIRONMENT | {"JAX_DEBUG_NANS": "1", "JAX_ENABLE_X64": "1"}
    run(script, "--total-timesteps", 2 * BATCH, cwd=tmp_path, env=switches)
    assert len(rows(folder_of(tmp_path))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, key, reason",
    [(*FIRST, "", "No API key"), (*FIRST, "a" * 40, ""), ("ppo_agalite_memorymaze", "", "No API key")],
)
def test_without_weights_and_biases_nothing_begins(script, key, reason, tmp_path):
    """Without a login or a server, the run prints W&B's error as one sentence and leaves no arguments."""
    server = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"}
    variables = ENVIRONMENT | server | {"WANDB_API_KEY": key, "HOME": str(tmp_path / "home")}
    _, err = run(script, "--track", cwd=tmp_path, expect=1, env=variables, stdin=subprocess.DEVNULL)
    assert err.splitlines()[-1].startswith("--track: ") and reason in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.glob("runs/*/args.json"))


@pytest.mark.slow
@pytest.mark.parametrize("script", FIRST)
def test_several_seeds_have_rows_each(script, tmp_path, monkeypatch):
    """--num-seeds 2 leaves a row per update and seed, and the seeds differ. W&B gets each row at its global_step, and
    the evaluation as its summary. A resumed run continues there, under the name of its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "jit", quick_jit)
    tracker, module, started = mock.Mock(), load(script), []
    # Stands for an evaluation: two numbers of each seed's parameters.
    of_params = lambda env, agent, params, *_: {"success": jax.tree.leaves(params)[1].ravel()[:2]}
    monkeypatch.setattr(module, "evaluate", of_params)
    monkeypatch.setattr(wandb, "init", lambda **options: started.append(options) or tracker)
    first = [*small_flags(script), "--num-seeds", "2", "--seed", "3"]
    for updates, flags in ((2, first), (4, ["--resume"])):
        folder = [str(path) for path in tmp_path.glob("runs/*")]
        module.main(module.parse_args([*flags, *folder, "--track", "--total-timesteps", str(updates * BATCH)]))
    folder = folder_of(tmp_path)
    expected = [(update, seed, update * BATCH) for update in (1, 2, 3, 4) for seed in (3, 4)]
    assert [(int(row["update"]), int(row["seed"]), int(row["global_step"])) for row in rows(folder)] == expected
    losses = [row["losses/value_loss"] for row in rows(folder)]
    assert all(a != b for a, b in zip(losses[::2], losses[1::2], strict=True))
    leaf = jax.tree.leaves(checkpoint(folder)["train_state"]["params"])[1].reshape(2, -1)  # of seeds 3 and 4
    success = leaf[:, :2].mean(1).tolist()
    assert json.loads((folder / "evaluation.json").read_text())["sampled"]["success"] == pytest.approx(success)
    assert success[0] != success[1]

    assert {(options["id"], options["resume"]) for options in started} == {(folder.name, "allow")}
    logged = [(call.kwargs.get("step"), call.args[0]) for call in tracker.log.call_args_list]
    assert [step for step, _ in logged] == [step for *_, step in expected]
    assert all(f"seed_{seed}/losses/entropy" in row for (_, row), (_, seed, _) in zip(logged, expected, strict=True))
    summaries = [call.args[0] for call in tracker.summary.update.call_args_list]
    assert len(summaries) == 2 and summaries[-1]["eval/success"] == pytest.approx(sum(success) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("script", FIRST)
def test_distributed_needs_a_job(script, tmp_path):
    """Started by hand, --distributed says in one sentence that it has found no other processes and what to do for a run
    of one process, and leaves nothing."""
    _, err = run(script, "--distributed", cwd=tmp_path, expect=1)
    assert err.splitlines()[-1].startswith("--distributed needs SLURM, MPI or a cloud (else --no-distributed)")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Some errors were detected")
@pytest.mark.parametrize("script", FIRST)
@pytest.mark.parametrize(
    "lines, drawn",
    [
        ("1,64,\n1,128,0.5\n1,1", [(64, np.nan), (128, 0.5)]),
        ("1,64,0.5\n", [(64, 0.5)]),
        ("1,64,\n", [(64, np.nan)]),
    ],
)
def test_a_row_that_is_cut_short_is_not_drawn(script, lines, drawn, tmp_path, monkeypatch):
    """A full disk may cut the last row of metrics.csv. The curve shows the other rows, also if there is only one."""
    module, figures = load(script), []
    original = module.Figure
    monkeypatch.setattr(module, "Figure", lambda **options: figures.append(original(**options)) or figures[-1])
    (tmp_path / "metrics.csv").write_text(f"seed,global_step,charts/episodic_return\n{lines}")
    module.plot_learning_curves(tmp_path, ["charts/episodic_return"])
    (line,) = figures[0].axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), drawn)
    assert (tmp_path / "learning_curve.png").stat().st_size > 1000


@pytest.mark.parametrize("name", SCRIPTS + MEMORYMAZE)
def test_help_shows_every_flag(name, capsys):
    """--help names each flag with its comment."""
    script = load(name)
    with pytest.raises(SystemExit) as ended:
        script.parse_args(["--help"])
    shown = "".join(x for x in capsys.readouterr().out if x.isalnum() or x in "-_")  # without boxes and line breaks
    assert ended.value.code == 0
    lines = {line.strip().split(":")[0]: line for line in inspect.getsource(script.Args).splitlines() if "  # " in line}
    for field in dataclasses.fields(script.Args):
        comment = lines[field.name].split("  # ")[1]
        assert f"--{field.name.replace('_', '-')}" in shown
        assert "".join(x for x in comment if x.isalnum() or x in "-_") in shown, comment


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """-> a function that runs main of a script with a stand-in for its state, until training begins -> the state."""
    monkeypatch.chdir(tmp_path)

    def begin(name: str, **changes):
        module, started = load(name), []

        def init(args, env, agent, key):
            train_state = module.TrainState.create(apply_fn=None, params=jnp.zeros(1), tx=optax.identity())
            return module.RunnerState(train_state, key, *[jnp.zeros(args.num_envs)] * 4)

        def train(args, update, state, *_):
            started.append(state)
            raise SystemExit

        monkeypatch.setattr(module, "init", init)
        monkeypatch.setattr(module, "train", train)
        with pytest.raises(SystemExit):
            module.main(tiny_args(module, **changes))
        return started[0]

    return begin


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_seed_decides_what_is_drawn(name, begin):
    """--seed 5 --num-seeds 2 starts from the keys of 5 and 6."""
    keys = jax.random.key_data(begin(name, seed=5, num_seeds=2).key).tolist()
    assert keys == [jax.random.key_data(jax.random.key(seed)).tolist() for seed in (5, 6)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_run_has_a_folder_of_its_own(name, begin, tmp_path, monkeypatch):
    """Two runs of one seed that start a nanosecond apart do not share a folder. --runs-dir sets where it is."""
    monkeypatch.setattr(load(name), "time", mock.Mock(time_ns=mock.Mock(side_effect=[10**18 + 1, 10**18 + 2])))
    for _ in range(2):
        begin(name, runs_dir="else/where")
    assert [path.name for path in tmp_path.iterdir()] == ["else"]
    folders = list((tmp_path / "else" / "where").iterdir())
    assert len(folders) == 2 and all((folder / "args.json").exists() for folder in folders)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unforeseen_error_is_not_swallowed(name, tmp_path, monkeypatch):
    """What no clause of `main` knows ends the run with its traceback, and so with an exit status other than 0."""
    module = load(name)
    monkeypatch.setattr(module, "init", mock.Mock(side_effect=RuntimeError("unforeseen")))
    with pytest.raises(RuntimeError, match="unforeseen"):
        module.main(tiny_args(module, runs_dir=str(tmp_path)))


@pytest.mark.parametrize("name", TMAZE)
def test_evaluations_have_no_exploration_noise(name, tmp_path, monkeypatch):
    """The evaluation and the video use the policy without noise."""
    module, seen = load(name), []
    monkeypatch.setattr(jax, "jit", quick_jit)
    monkeypatch.setattr(module, "train", lambda args, update, state, *_: state)
    monkeypatch.setattr(module, "plot_learning_curves", lambda *_: None)
    monkeypatch.setattr(module, "report", lambda args, env, *_: seen.append(env))
    monkeypatch.setattr(module, "record_video", lambda env, *_: seen.append(env))
    module.main(tiny_args(module, runs_dir=str(tmp_path), eval_episodes=5, capture_video=True))
    assert [(env.num_envs, env.scale) for env in seen] == [(5, 0), (1, 0)]
