"""Runs the scripts as a user does: by a command, in an empty folder."""

import atexit
import csv
import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from common import CRAFTAX, MEMORYMAZE, assert_identical, data, load, quick_compiler_options

REPOSITORY = Path(__file__).parents[1]

# Values that make a script small, if it has the field. num_steps is shorter than an episode, so runs are cut in
# mid-episode.
SMALL_FLAGS = {
    "corridor_len": 10, "max_episode_steps": 40, "env_id": "Craftax-Classic-Symbolic-v1", "optimistic_reset_ratio": 2,
    "num_layers": 1, "d_model": 16, "d_head": 8, "num_heads": 1, "d_ffc": 16, "eta": 2, "r": 1, "memory_len": 6,
    "hidden_size": 16, "d_encoder": 16, "d_actor": 16, "d_critic": 16,
    "num_channels": 2, "num_envs": 4, "num_steps": 16, "num_minibatches": 2, "update_epochs": 1, "eval_episodes": 10,
    "anneal_lr": False,  # otherwise a run could not be extended
}  # fmt: skip
BATCH = 4 * 16  # environment steps per update with these flags
PATIENCE = 3600  # seconds until a process counts as hung; a busy machine must not fail a test


@functools.cache
def small_flags(script: str) -> list[str]:
    """The flags that make this script small."""
    own = {field.name for field in dataclasses.fields(load(script).Args)}
    own -= set() if script in CRAFTAX else {"env_id"}
    flags = {name.replace("_", "-"): value for name, value in SMALL_FLAGS.items() if name in own}
    return [f"--no-{name}" if value is False else f"--{name}={value}" for name, value in flags.items()]


FINISHED = tempfile.mkdtemp()  # for runs that several tests share
atexit.register(shutil.rmtree, FINISHED, ignore_errors=True)

# Programs are compiled quickly. Processes reuse what others have compiled, see conftest.py.
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
    + "".join(f" --{name}={str(value).lower()}" for name, value in quick_compiler_options().items()),
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "PYTHONUNBUFFERED": "",  # not set, as in a batch job whose output goes to a file
    "PYTHONPATH": str(REPOSITORY),  # for copies of scripts in other folders
}


def start(
    script: str, *flags, cwd: Path, small: bool = True, stand_in: bool = True, path: Path | None = None, **options
) -> subprocess.Popen:
    """Starts `python script.py flags` in cwd, with a stand-in for Craftax and Memory Maze, if `stand_in`.

    path: an edited copy of the script, to run instead.
    """
    program = [path or REPOSITORY / f"{script}.py"]
    if script in CRAFTAX + MEMORYMAZE and stand_in:
        program = [REPOSITORY / "tests" / "with_stand_in.py", script]
    command = [sys.executable, *map(str, program), *(small_flags(script) if small else []), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, **({"env": ENVIRONMENT} | pipes | options))


def edited(script: str, folder: Path, *changes: tuple[str, str]) -> Path:
    """Copies the script to `folder` and replaces texts, each of which must occur once."""
    text = (REPOSITORY / f"{script}.py").read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / f"{script}.py"
    path.write_text(text)
    return path


def import_copy(path: Path):
    """Imports an edited copy of a script."""
    spec = importlib.util.spec_from_file_location(f"copy_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def finish(process: subprocess.Popen, expect: int = 0) -> tuple[str, str]:
    """Waits for the process -> stdout, stderr. Its exit status must be `expect`."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == expect, f"exit status {process.returncode}\n{out}\n{err}"
    return out, err


def run(script: str, *flags, expect: int = 0, **options) -> tuple[str, str]:
    """Runs `python script.py flags` to its end -> stdout, stderr."""
    return finish(start(script, *flags, **options), expect)


def folder_of(cwd: Path) -> Path:
    """The one run folder in cwd."""
    (folder,) = (cwd / "runs").iterdir()
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def lasting(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, without the columns that depend on the clock."""
    return [{k: v for k, v in row.items() if k not in ("elapsed", "charts/SPS")} for row in rows(folder)]


def wait_for_row(process: subprocess.Popen, cwd: Path, number: int):
    """Waits until the process has written row `number` of metrics.csv."""
    deadline = time.time() + PATIENCE
    while not any(len(rows(path.parent)) >= number for path in cwd.glob("runs/*/metrics.csv")):
        assert process.poll() is None and time.time() < deadline, finish(process)
        time.sleep(0.02)


def wait_until(condition):
    """Waits for something that happens soon, or later on a busy machine."""
    deadline = time.time() + PATIENCE
    while not condition():
        assert time.time() < deadline, "timed out"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether this process runs, on Linux."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def refusal(script: str, argv: list[str], capsys) -> str:
    """What parse_args prints when it refuses, as one line."""
    with pytest.raises(SystemExit) as refused:
        load(script).parse_args(argv)
    assert refused.value.code not in (0, None)
    printed = capsys.readouterr().err + (refused.value.code if isinstance(refused.value.code, str) else "")
    assert "Traceback" not in printed
    return " ".join(printed.replace("│", " ").split())


def steps(folder: Path) -> list[int]:
    """The steps of the run's checkpoints, sorted."""
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def checkpoint(folder: Path, step: int | None = None) -> dict:
    """The newest checkpoint, or that of `step`, read without the script: nested dictionaries of arrays."""
    path = (folder / "checkpoints" / str(max(steps(folder)) if step is None else step) / "default").absolute()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # wherever it was written
    with ocp.StandardCheckpointer() as reader:
        saved = reader.metadata(path).item_metadata.tree
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved)
        return jax.tree.map(lambda x: np.asarray(data(x)), reader.restore(path, like))


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files of a folder and their contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@functools.cache
def finished(script: str, updates: int = 200, interval: int = 20, *flags: str, **options) -> Path:
    """The folder of a finished run whose last two checkpoints are `interval` updates apart. Copy it to change it. What
    the run printed is beside it, see `printed`."""
    cwd = Path(tempfile.mkdtemp(dir=FINISHED))
    flags = "--total-timesteps", updates * BATCH, "--checkpoint-interval", interval, *flags
    out, err = run(script, *flags, cwd=cwd, **options)
    (cwd / "printed.json").write_text(json.dumps([out, err]))
    return folder_of(cwd)


def printed(folder: Path) -> tuple[str, str]:
    """stdout, stderr of a run of `finished`."""
    return tuple(json.loads((folder.parents[1] / "printed.json").read_text()))


def saved_args(folder: Path) -> dict:
    return json.loads((folder / "args.json").read_text())


def assert_same_outcome(folder: Path, expected: Path):
    """As if the run had never stopped: the same bits in the last checkpoint, the same rows and evaluation."""
    assert lasting(folder) == lasting(expected)
    assert steps(folder)[-1] == steps(expected)[-1]
    assert_identical(checkpoint(folder), checkpoint(expected))
    assert (folder / "evaluation.json").read_bytes() == (expected / "evaluation.json").read_bytes()
