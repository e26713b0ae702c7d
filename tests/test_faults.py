"""What a run does when it is killed, interrupted, out of disk, damaged, edited or diverging."""

import functools
import json
import re
import resource
import shlex
import shutil
import signal
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cli import (
    BATCH,
    PATIENCE,
    assert_same_outcome,
    checkpoint,
    edited,
    finish,
    finished,
    folder_of,
    import_copy,
    rows,
    run,
    snapshot,
    start,
    steps,
    wait_for_row,
)
from common import FIRST, assert_identical, load, quick_jit, tiny_args

pytestmark = pytest.mark.slow

FLAGS = ["--total-timesteps", 200 * BATCH, "--checkpoint-interval", 20]  # those of `finished`


@pytest.mark.parametrize("script", FIRST)
def test_run_killed_before_its_first_checkpoint(script, tmp_path):
    """If a run was killed before it saved anything, --resume says so in one sentence."""
    process = start(script, *FLAGS, cwd=tmp_path)
    while not list(tmp_path.glob("runs/*/args.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    finish(process, expect=-signal.SIGKILL)
    folder = folder_of(tmp_path)
    assert not steps(folder) if (folder / "checkpoints").exists() else True
    _, err = run(script, "--resume", folder, cwd=tmp_path, small=False, expect=1)
    assert "no checkpoint" in err.splitlines()[-1] and str(folder) in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize("script", FIRST)
def test_ctrl_c_saves_and_says_how_to_resume(script, tmp_path):
    """On Ctrl-C, a run finishes the update, saves it and prints a command that completes the run, also in a folder with
    a space in its name."""
    cwd = tmp_path / "my runs"
    cwd.mkdir()
    process = start(script, *FLAGS, cwd=cwd)
    wait_for_row(process, cwd, 30)
    process.send_signal(signal.SIGINT)
    out, err = finish(process, expect=128 + signal.SIGINT)
    folder = folder_of(cwd)
    assert "Traceback" not in err
    assert 30 <= steps(folder)[-1] == len(rows(folder)) < 200
    command = shlex.split(out.split("To continue: ")[1])
    assert command[0] == "python" and command[-2:] == ["--resume", str(folder)]
    run(script, *command[2:], cwd=cwd, small=False)
    assert_same_outcome(folder, finished(script))


@pytest.mark.parametrize("script", FIRST)
def test_ctrl_c_while_compiling(script, tmp_path):
    """Before training begins, Ctrl-C ends the run at once, without a traceback. The copy waits instead of compiling."""
    line = '        print(f"Run folder: {run_dir}\\nCompiling, which takes about half a minute ...", flush=True)\n'
    copy = edited(script, tmp_path, (line, f"{line}        time.sleep({PATIENCE})\n"))
    process = start(script, *FLAGS, cwd=tmp_path, path=copy)
    assert any(line.startswith("Compiling") for line in iter(process.stdout.readline, ""))
    process.send_signal(signal.SIGINT)
    _, err = finish(process, expect=-signal.SIGINT)
    assert "Traceback" not in err


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


@pytest.fixture
def signalled(tmp_path):
    """-> a function that trains in this process for three updates and sends a signal in update `at` (None: never) ->
    actions on this signal at the end of each update, updates that were saved, exit status or None."""
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def train(script: str, number: int | None, at: int | None = 2):
        module, actions, checkpoints = load(script), [], mock.Mock(all_steps=lambda: [])

        def update(state):
            if state == at:
                signal.raise_signal(number)
            if at:
                actions.append(signal.getsignal(number))
            return state + 1, {"charts/episodes": np.zeros(1, int)}, {}

        args, status = tiny_args(module, total_timesteps=3 * tiny_args(module).batch_size), None
        assert args.num_updates == 3
        try:
            module.train(args, update, 1, 0, tmp_path, checkpoints, None, [])
        except SystemExit as stopped:
            status = stopped.code
        return actions, [call.args[0] for call in checkpoints.save.call_args_list], status

    yield train
    for number in SIGNALS:
        signal.signal(number, before[number])


@pytest.mark.parametrize("script", FIRST)
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_a_second_one_ends_the_run(script, number, signalled):
    """Signals of a job scheduler or a closed terminal do what Ctrl-C does. The first restores the default action, so
    that the next one ends the run at once. During the first update, which compiles, nothing is changed."""
    before = signal.getsignal(number)
    assert signalled(script, number) == ([before, signal.SIG_DFL], [2], 128 + number)


@pytest.mark.parametrize("script", FIRST)
def test_nohup_is_respected(script, signalled):
    """A run that was started with nohup continues when the terminal is closed."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    assert signalled(script, signal.SIGHUP) == ([signal.SIG_IGN] * 3, [3], None)


@pytest.mark.parametrize("script", FIRST)
def test_a_signal_after_training_ends_the_run(script, signalled):
    """After training, all signals have their default action again: in the evaluation nothing is left to save, so the
    first signal ends the run."""
    signalled(script, None, at=None)
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * 4


# ------------------------------------------------------------------------------------------------------------- damage


def truncate(step):
    """As a crash of the machine leaves it."""
    for path in step.rglob("d/*"):  # all files with arrays: which of them are needed varies between runs
        path.write_bytes(path.read_bytes()[:100])


def delete(step):
    for path in step.rglob("d/*"):
        path.unlink()


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


def garble(step):
    (step / "default" / "_METADATA").write_text("{")


DAMAGES = [truncate, delete, empty, garble]


# tensorstore continues to read other parts of a damaged checkpoint, whose errors nobody waits for.
quiet = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def restored(monkeypatch):
    """-> a function that calls main in this process -> the parameters of a restored folder that `report` gets."""

    def evaluate(module, folder, flag="--evaluate"):
        got = []
        monkeypatch.setattr(jax, "jit", quick_jit)
        monkeypatch.setattr(module, "report", lambda args, env, agent, params, *_: got.append(params))
        module.main(module.parse_args([flag, str(folder)]))
        return got[0]

    return evaluate


@quiet
@pytest.mark.parametrize("script", FIRST)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_checkpoint_before_a_damaged_one_is_used(script, damage, tmp_path, restored, capsys):
    """However the newest checkpoint is damaged, the run uses the previous one, says so in one sentence, and changes no
    file."""
    folder = tmp_path / "run"
    shutil.copytree(finished(script), folder)
    whole = checkpoint(folder, 180)["train_state"]["params"]
    damage(folder / "checkpoints" / "200")
    before = snapshot(folder / "checkpoints")
    params = restored(load(script), folder)
    assert_identical(jax.tree.map(lambda x: x[0], params), jax.tree.map(lambda x: x[0], whole))
    printed = [line for line in capsys.readouterr().out.splitlines() if "Checkpoint" in line]
    assert len(printed) == 1 and printed[0].startswith("Checkpoint 200 cannot be read: ") and len(printed[0]) < 200
    assert snapshot(folder / "checkpoints") == before


@quiet
@pytest.mark.parametrize("script", FIRST)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_run_completes_after_damage(script, damage, tmp_path):
    """If the newest checkpoint is damaged, a run continues from the previous one and replaces the damaged one."""
    module = load(script)
    args = tiny_args(module, total_timesteps=3 * tiny_args(module).batch_size, checkpoint_interval=1)
    update = lambda state: ({"sum": state["sum"] + 1}, {"charts/episodes": np.zeros(1, int)}, {})
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    manager = functools.partial(
        ocp.CheckpointManager, tmp_path / "checkpoints", options=options, item_handlers=ocp.StandardCheckpointHandler()
    )
    first = {"sum": jnp.zeros(())}
    with manager() as checkpoints:
        module.train(args, update, first, 0, tmp_path, checkpoints, None, [])
    damage(tmp_path / "checkpoints" / "3")
    with manager() as checkpoints:
        number, state = module.restore(checkpoints, first)
        assert number == state["sum"] == 2
        module.train(args, update, state, number, tmp_path, checkpoints, None, [])
    assert [int(row["update"]) for row in rows(tmp_path)] == [1, 2, 3]
    assert checkpoint(tmp_path, 3) == {"sum": 3}


@pytest.mark.parametrize("script", FIRST)
def test_a_damaged_run_ends_like_a_whole_one(script, tmp_path):
    """With a damaged newest checkpoint, --resume ends with the same bits as a run that was never damaged."""
    folder = tmp_path / "run"
    shutil.copytree(finished(script), folder)
    truncate(folder / "checkpoints" / "200")
    run(script, "--resume", "run", cwd=tmp_path, small=False)  # a relative path, as users type it
    assert_same_outcome(folder, finished(script))


@quiet
@pytest.mark.parametrize("script", FIRST)
def test_no_readable_checkpoint_is_said(script, tmp_path, restored):
    """If every checkpoint is damaged, one sentence says that none can be read."""
    folder = tmp_path / "run"
    shutil.copytree(finished(script), folder)
    for step in steps(folder):
        truncate(folder / "checkpoints" / str(step))
    with pytest.raises(SystemExit, match="no checkpoint that can be read"):
        restored(load(script), folder)


# --------------------------------------------------------------------------------------------------- another model

HIDDEN = "x, memory = AGaLiTe(self.args)(obs, reset, memory)"
ADAM = "optax.adam(args.learning_rate_at, eps=args.adam_eps)"
EDITS = {  # how a user edits the script, and the first difference
    "a layer more": (
        HIDDEN,
        f"{HIDDEN}; x = x + dense(16)(x)",
        "Dense_2/bias is float32[1, 4] there and float32[1, 16]",
    ),
    "no memory": (HIDDEN, "x = obs", "there and missing"),
    "another type": ("jnp.ones(B, jnp.int32)", "jnp.ones(B, jnp.int16)", "tick is int32[1, 4] there and int16[1, 4]"),
    "another optimizer": (ADAM, "optax.sgd(args.learning_rate_at, momentum=0.9)", "opt_state/"),
}


@pytest.mark.parametrize("script", FIRST)
@pytest.mark.parametrize("edit", EDITS)
def test_checkpoints_of_a_script_before_it_was_edited_stay(script, edit, tmp_path, restored):
    """If a checkpoint does not fit the edited model, a sentence names the difference, and the folder stays as it is."""
    folder, (old, new, difference) = tmp_path / "run", EDITS[edit]
    shutil.copytree(finished(script), folder)
    before, copy = snapshot(folder), import_copy(edited(script, tmp_path, (old, new)))
    for flag in ("--resume", "--evaluate"):
        with pytest.raises(SystemExit) as refused:
            restored(copy, folder, flag)
        sentence = refused.value.code
        assert sentence.startswith(f"Checkpoint 200 in {folder / 'checkpoints'} does not fit this script: "), sentence
        assert difference in sentence and sentence.endswith(" here") and "\n" not in sentence, sentence
        assert snapshot(folder) == before


@pytest.mark.parametrize("script", FIRST)
def test_checkpoints_of_other_sizes_stay(script, tmp_path, restored):
    """The same holds if the sizes in args.json are no longer those of the checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(finished(script), folder)
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(args | {"d_actor": 17}))
    before = snapshot(folder)
    with pytest.raises(SystemExit, match=r"float32\[1, 16\] there and float32\[1, 17\] here$"):
        restored(load(script), folder, "--resume")
    assert snapshot(folder) == before


# ---------------------------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("script", FIRST)
@pytest.mark.parametrize("victim", ["checkpoint", "metrics"])
@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
def test_full_disk_ends_the_run_with_a_word(script, victim, tmp_path):
    """If nothing more can be written, the run ends with a message, and earlier checkpoints can be read."""
    # The victim meets the limit (bytes per file) long before the other: the next checkpoint comes within 20 rows, which
    # take fewer than 5000 bytes; or the next row comes, some 200 rows before the next checkpoint.
    interval, allowed = (20, 5000) if victim == "checkpoint" else (200, 100)
    process = start(script, "--total-timesteps", 2000 * BATCH, "--checkpoint-interval", interval, cwd=tmp_path)
    wait_for_row(process, tmp_path, interval + 5)
    limit = (folder_of(tmp_path) / "metrics.csv").stat().st_size + allowed
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    _, err = finish(process, expect=1)
    folder = folder_of(tmp_path)
    assert "File too large" in err and f'--resume "{folder}" continues from the newest' in err
    assert bool(re.search(r"checkpoint \d+ cannot be written", err)) == (victim == "checkpoint"), err
    # Threads of tensorstore may still complain about a closed event loop, but the script prints no traceback.
    assert f'{script}.py", line' not in err and "orbax" not in err.replace(".orbax-checkpoint-tmp", ""), err
    assert steps(folder)[-1] >= 20
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(checkpoint(folder)["train_state"]["params"]))


# ---------------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("script", FIRST)
def test_diverging_run_stops_before_it_saves(script, tmp_path):
    """NaN or infinity stops the run, which names update and seed. The previous checkpoint stays, and it is finite."""
    # With one gradient step per update, the first update is finite and the next one is not.
    flags = ["--learning-rate", "1e9", "--num-minibatches", 1, "--seed", 7, "--checkpoint-interval", 1]
    _, err = run(script, *FLAGS[:2], *flags, cwd=tmp_path, expect=1)
    folder = folder_of(tmp_path)
    done = len(rows(folder))
    (sentence,) = [line for line in err.splitlines() if "not finite" in line]
    assert sentence.startswith(f"Update {done + 1} is not saved: losses/") and sentence.endswith(
        " of seed 7 is not finite"
    )
    assert "Traceback" not in err
    assert steps(folder)[-1] == done
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(checkpoint(folder)["train_state"]["params"]))
