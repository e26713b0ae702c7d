"""What a run does when it is killed, interrupted, out of disk, damaged or diverging."""

import random
import resource
import shlex
import shutil
import signal
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cli import BATCH, checkpoint, finish, finished, folder_of, lasting, rows, run, start, steps, wait_for_row
from common import CRAFTAX, FIRST, MYSTERYPATH, SCRIPTS, assert_identical, data, load, quick_jit

FLAGS = ["--total-timesteps", 200 * BATCH, "--checkpoint-interval", 20]  # those of `finished`


def assert_same_outcome(folder, script, updates=200):
    """As if the run had never stopped: the same bits in the last checkpoint, the same rows, the same evaluation."""
    expected = finished(script, updates, updates // 10)
    assert lasting(folder) == lasting(expected)
    assert steps(folder)[-1] == steps(expected)[-1] == updates
    assert_identical(checkpoint(folder), checkpoint(expected))
    assert (folder / "evaluation.json").read_bytes() == (expected / "evaluation.json").read_bytes()


@pytest.mark.parametrize("script", SCRIPTS[:-1])  # the last would show nothing that its siblings do not
def test_killed_run_resumes_bit_for_bit(script, tmp_path):
    """A run killed twice in mid-episode and resumed each time ends with the very numbers of one that was not."""
    updates = 40 if script in MYSTERYPATH + CRAFTAX else 200  # pictures and symbols are slow
    flags = ["--total-timesteps", updates * BATCH, "--checkpoint-interval", updates // 10]
    process = start(script, *flags, cwd=tmp_path)
    for row in (updates // 8, updates * 11 // 20):
        wait_for_row(process, tmp_path, row)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        finish(process, expect=-signal.SIGKILL)
        folder = folder_of(tmp_path)
        assert len(rows(folder)) < updates, "killed too late"
        assert not checkpoint(folder)["runner"]["reset"].all(), "every episode had just ended"
        process = start(script, "--resume", folder, cwd=tmp_path, small=False)
    finish(process)
    assert_same_outcome(folder, script, updates)


@pytest.mark.parametrize("script", FIRST)
def test_small_checkpoints_keep_the_learner(script, tmp_path):
    """With --no-checkpoint-envs a checkpoint holds parameters, optimiser, key and counter alone; a resumed run goes on
    from these, in fresh episodes."""
    run(script, "--no-checkpoint-envs", "--total-timesteps", 20 * BATCH, cwd=tmp_path)
    folder = folder_of(tmp_path)
    before = checkpoint(folder)["runner"]
    assert set(before) == {"params", "opt_state", "key", "update"} and before["update"] == [20]
    run(script, "--resume", folder, "--total-timesteps", 21 * BATCH, cwd=tmp_path, small=False)
    assert [int(row["update"]) for row in rows(folder)] == list(range(1, 22))
    after = checkpoint(folder)["runner"]
    assert after["update"] == [21]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before["params"], after["params"])
    assert 0 < max(jax.tree.leaves(moved)) < 0.1, "an update away from those saved"


@pytest.mark.parametrize("script", FIRST)
def test_run_killed_before_its_first_checkpoint(script, tmp_path):
    """Where a run was killed before it saved anything, --resume says so in a sentence."""
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
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_resume(script, number, tmp_path):
    """Ctrl-C and SIGTERM finish the update, save it and print a command that completes the run."""
    process = start(script, *FLAGS, cwd=tmp_path)
    wait_for_row(process, tmp_path, 30)
    process.send_signal(number)
    out, err = finish(process, expect=128 + number)
    folder = folder_of(tmp_path)
    assert "Traceback" not in err
    assert 30 <= steps(folder)[-1] == len(rows(folder)) < 200
    command = shlex.split(out.split("to go on: ")[1])
    assert command[0] == "python" and command[-2:] == ["--resume", str(folder)]
    if number == signal.SIGINT:
        run(script, *command[2:], cwd=tmp_path, small=False)
        assert_same_outcome(folder, script)


# ------------------------------------------------------------------------------------------------------------- damage


def truncate(step):
    """As a crash of the machine leaves it."""
    largest = max(step.rglob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


def delete(step):
    max(step.rglob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size).unlink()


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


def garble(step):
    (step / "default" / "_METADATA").write_text("{")


def flip(step):
    """One bit of a parameter in a file that is valid otherwise: nothing but the checksum can tell."""
    path = (step / "default").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(path)
        leaves, structure = jax.tree.flatten(tree["runner"]["learner"]["params"])
        bits = np.array(leaves[0]).view(np.int32)
        bits.flat[0] ^= 1
        leaves[0] = bits.view(np.float32)
        tree["runner"]["learner"]["params"] = jax.tree.unflatten(structure, leaves)
        checkpointer.save(path, tree, force=True)


DAMAGES = [truncate, delete, empty, garble, flip]


@pytest.fixture
def restored(monkeypatch):
    """-> a function: what main, called in this process, hands to `report` when it evaluates a folder."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def evaluate(script, folder):
        module, got = load(script), []
        monkeypatch.setattr(jax, "jit", quick_jit)
        monkeypatch.setattr(module, "report", lambda args, agent, runner, *_: got.append(runner))
        module.main(module.parse_args(["--evaluate", str(folder)]))
        return got[0]

    yield evaluate
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("script", FIRST)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoint_is_set_aside(script, damage, tmp_path, restored, capsys):
    """Whatever happened to the newest checkpoint, the one before is used, and a word said."""
    folder = tmp_path / "run"
    shutil.copytree(finished(script), folder)
    whole = checkpoint(folder, 180)
    (folder / "checkpoints" / "damaged_200" / "default").mkdir(parents=True)  # it has happened before
    damage(folder / "checkpoints" / "200")
    runner = restored(script, folder)
    ours, expected = jax.tree.leaves(runner.learner.params), jax.tree.leaves(whole["runner"]["learner"]["params"])
    assert_identical(ours, expected)
    assert int(data(runner.learner.update)[0]) == 180
    said = [line for line in capsys.readouterr().out.splitlines() if "is damaged" in line]
    assert len(said) == 1 and "checkpoint 200 is damaged" in said[0] and len(said[0]) < 400
    assert damage is not flip or "checksum" in said[0]
    assert steps(folder) == [180] and len(list((folder / "checkpoints").glob("damaged_200*"))) == 2


@pytest.mark.parametrize("script", FIRST)
def test_run_completes_after_damage(script, tmp_path):
    """A run whose newest checkpoint is damaged goes on from the one before, to the same end, and saves it again."""
    folder = tmp_path / "run"
    shutil.copytree(finished(script), folder)
    truncate(folder / "checkpoints" / "200")
    run(script, "--resume", folder, cwd=tmp_path, small=False)
    assert_same_outcome(folder, script)


@pytest.mark.parametrize("script", FIRST)
def test_no_readable_checkpoint_is_said(script, tmp_path, restored):
    """With every checkpoint damaged, one sentence says that none can be read."""
    folder = tmp_path / "run"
    shutil.copytree(finished(script), folder)
    for step in steps(folder):
        truncate(folder / "checkpoints" / str(step))
    with pytest.raises(SystemExit, match="no checkpoint that can be read"):
        restored(script, folder)


# ---------------------------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("script", FIRST)
@pytest.mark.parametrize("victim", ["checkpoint", "metrics"])
@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
def test_full_disk_ends_the_run_with_a_word(script, victim, tmp_path):
    """When nothing more can be written, the run ends with a message, and what was saved before can be read."""
    process = start(script, "--total-timesteps", 2000 * BATCH, "--checkpoint-interval", 20, cwd=tmp_path)
    wait_for_row(process, tmp_path, 25)
    limit = 30_000  # bytes a file may have: too few for a checkpoint
    if victim == "metrics":
        limit = (folder_of(tmp_path) / "metrics.csv").stat().st_size + 100
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    _, err = finish(process, expect=1)
    folder = folder_of(tmp_path)
    assert str(folder) in err and "File too large" in err and "--resume" in err
    # Threads of tensorstore may still complain about a closed event loop, but no traceback is the script's.
    assert f'{script}.py", line' not in err and "orbax" not in err.replace(".orbax-checkpoint-tmp", ""), err
    assert steps(folder)[-1] >= 20
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(checkpoint(folder)["runner"]["learner"]["params"]))


# ---------------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("script", FIRST)
def test_diverging_run_stops_before_it_saves(script, tmp_path):
    """NaN or infinity stops the run naming update and seed; the checkpoint before stays, with finite parameters."""
    flags = ["--learning-rate", "1e30", "--num-seeds", 1, "--seed", 7, "--checkpoint-interval", 1]
    _, err = run(script, *FLAGS[:2], *flags, cwd=tmp_path, expect=1)
    folder, said = folder_of(tmp_path), err.splitlines()[-1]
    done = len(rows(folder))
    assert f"update {done + 1}, seed 7:" in said and "not finite" in said and "Traceback" not in err
    assert steps(folder)[-1] == done
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(checkpoint(folder)["runner"]["learner"]["params"]))
