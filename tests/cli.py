"""Runs the scripts as a user does: a command, from a folder of its own."""

import atexit
import csv
import functools
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
from common import CRAFTAX, MEMORYMAZE, data, quick_compiler_options

REPOSITORY = Path(__file__).parents[1]

# Flags that make a script small; --num-steps is shorter than an episode, so runs are cut in mid-episode.
TMAZE = (
    "--corridor-len 10 --max-episode-steps 40 --d-actor 16 --d-critic 16 --num-envs 4 --num-steps 16 "
    "--num-minibatches 2 --update-epochs 1 --eval-episodes 20 --no-anneal-lr "  # or a run could not be made longer
)
LAYERS = "--num-layers 1 --d-model 16 --d-head 8 --num-heads 1 "
PICTURES = (
    "--d-actor 16 --d-critic 16 --num-envs 4 --num-steps 16 --num-minibatches 2 --update-epochs 1 --eval-episodes 20 "
)
SYMBOLS = PICTURES + "--env-id Craftax-Classic-Symbolic-v1 --optimistic-reset-ratio 2 --d-encoder 16 "
SMALL_FLAGS = {
    "ppo_agalite_tmaze": TMAZE + LAYERS + "--d-ffc 16 --eta 2 --r 1",
    "ppo_galite_tmaze": TMAZE + LAYERS + "--d-ffc 16 --eta 2",
    "ppo_gtrxl_tmaze": TMAZE + LAYERS + "--memory-len 6",
    "ppo_lstm_tmaze": TMAZE + "--hidden-size 16",
    "ppo_gru_tmaze": TMAZE + "--hidden-size 16",
    "ppo_agalite_mysterypath": PICTURES + LAYERS + "--d-ffc 16 --eta 2 --r 1",
    "ppo_gtrxl_mysterypath": PICTURES + LAYERS + "--memory-len 6",
    "ppo_agalite_craftax": SYMBOLS + LAYERS + "--d-ffc 16 --eta 2 --r 1",
    "ppo_gtrxl_craftax": SYMBOLS + LAYERS + "--memory-len 6",
    "ppo_lstm_memorymaze": PICTURES + "--hidden-size 16",
    "ppo_agalite_memorymaze": PICTURES + LAYERS + "--d-ffc 16 --eta 2 --r 1",
    "ppo_gtrxl_memorymaze": PICTURES + LAYERS + "--memory-len 6",
}
BATCH = 4 * 16  # environment steps of an update with these flags

# Each program is compiled once, in a hurry, for all the processes of a test session.
CACHE = tempfile.mkdtemp()
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
ENVIRONMENT = dict(
    os.environ, JAX_PLATFORMS="cpu", WANDB_MODE="offline", WANDB_SILENT="true", JAX_COMPILATION_CACHE_DIR=CACHE,
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    XLA_FLAGS=" ".join(f"--{name}={str(value).lower()}" for name, value in quick_compiler_options().items()),
)  # fmt: skip


def start(script: str, *flags, cwd: Path, small: bool = True, stand_in: bool = True, **options) -> subprocess.Popen:
    """Starts `python script.py flags` in cwd; of Craftax and Memory Maze with a stand-in, unless told otherwise."""
    small_flags = SMALL_FLAGS[script].split() if small else []
    program = [REPOSITORY / f"{script}.py"]
    if script in CRAFTAX + MEMORYMAZE and stand_in:
        program = [REPOSITORY / "tests" / "with_stand_in.py", script]
    command = [sys.executable, *map(str, program), *small_flags, *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, **({"env": ENVIRONMENT} | pipes | options))


def finish(process: subprocess.Popen, expect: int = 0) -> tuple[str, str]:
    """Waits for it -> stdout, stderr; it must end with the exit status `expect`."""
    try:
        out, err = process.communicate(timeout=300)
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
    """What metrics.csv holds."""
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def lasting(folder: Path) -> list[dict[str, str]]:
    """What metrics.csv holds, but for the columns that tell the time."""
    return [{k: v for k, v in row.items() if k not in ("elapsed", "charts/SPS")} for row in rows(folder)]


def wait_for_row(process: subprocess.Popen, cwd: Path, number: int):
    """Waits until the process has written row `number` of metrics.csv."""
    deadline = time.time() + 120
    while not any(len(rows(path.parent)) >= number for path in cwd.glob("runs/*/metrics.csv")):
        assert process.poll() is None and time.time() < deadline, finish(process)
        time.sleep(0.02)


def steps(folder: Path) -> list[int]:
    """The checkpoints there, sorted."""
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
    """All files of a folder and what is in them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@functools.cache
def finished(script: str, updates: int = 200, interval: int = 20) -> Path:
    """The folder of a finished run, with its last two checkpoints `interval` updates apart; copy it to change it."""
    cwd = Path(tempfile.mkdtemp(dir=CACHE))
    run(script, "--total-timesteps", updates * BATCH, "--checkpoint-interval", interval, cwd=cwd)
    return folder_of(cwd)


def saved_args(folder: Path) -> dict:
    return json.loads((folder / "args.json").read_text())
