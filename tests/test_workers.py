"""Workers: ends of episodes, errors, deaths and what is left behind."""

import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cli import PATIENCE, alive, wait_until
from tiny_env import EXIT, LOOP, RAISE, RAISE_UNPICKLABLE, STEP, WAIT, Tiny

from envs.workers import WorkerDied, WorkerFailed, Workers

TESTS = Path(__file__).parent
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def make():
    """-> a function that makes Workers from the environments' lengths; all are closed after the test."""
    made = []

    def make(*lengths, **options):
        made.append(Workers([functools.partial(Tiny, length, **options) for length in lengths]))
        return made[-1]

    yield make
    for envs in made:
        envs.close()
        assert not any(process.is_alive() for process in envs.processes)


def test_ends_of_episodes(make):
    """The step that ends an episode begins the next one; what belongs to the old one is in info."""
    envs = make(2, 3)
    obs, info = envs.reset(seed=[5, 6])
    np.testing.assert_array_equal(obs, [[0, 0], [0, 0]])
    np.testing.assert_array_equal(info["seed"], [5, 6])
    expected = [
        ([[1, 0], [1, 0]], [False, False], [False, False], None),
        ([[0, 1], [2, 0]], [False, False], [True, False], (0, [2, 0])),
        ([[1, 1], [0, 1]], [False, False], [False, True], (1, [3, 0])),
        ([[0, 2], [1, 1]], [True, False], [False, False], (0, [2, 1])),
    ]
    for obs, terminates, truncates, ended in expected:
        got, reward, terminated, truncated, info = envs.step(np.array([STEP, STEP]))
        np.testing.assert_array_equal(got, obs)
        np.testing.assert_array_equal(reward, [0.5, 0.5])
        np.testing.assert_array_equal(terminated, terminates)
        np.testing.assert_array_equal(truncated, truncates)
        if ended:
            i, final_obs = ended
            np.testing.assert_array_equal(info["final_obs"][i], final_obs)
            assert info["final_info"]["steps"][i] == final_obs[0]
    assert envs.metadata["autoreset_mode"].name == "SAME_STEP"


def test_two_halves_in_turn(make):
    """One steps while the program waits for the other, as in the training loop."""
    halves = [make(4), make(4)]
    for half in halves:
        half.reset(seed=0)
    halves[0].step_async(np.array([STEP]))
    for i in range(1, 8):
        halves[i % 2].step_async(np.array([STEP]))
        obs, *_ = halves[(i - 1) % 2].step_wait()
        assert obs[0, 0] == ((i - 1) // 2 + 1) % 4


def test_attributes(make):
    envs = make(2, 3)
    assert envs.get_attr("length") == (2, 3)
    envs.set_attr("length", [4, 5])
    assert envs.get_attr("length") == (4, 5)


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_killed_worker_is_named(make, when):
    envs = make(100, 100)
    envs.reset(seed=0)
    process = envs.processes[1]
    sentence = rf"^Worker 1 \(process {process.pid}\) was killed by SIGKILL$"
    if when == "before":
        process.kill()
        process.join()
    if when == "after":
        envs.step_async(np.array([STEP, STEP]))
        assert envs.parent_pipes[1].poll(PATIENCE)
        process.kill()
        process.join()
        envs.step_wait()  # its answer counts
    with pytest.raises(WorkerDied, match=sentence):
        envs.step_async(np.array([STEP, WAIT]))
        process.kill()
        envs.step_wait()
    for method in (envs.reset, lambda: envs.step(np.array([STEP, STEP])), envs.step_wait):
        with pytest.raises(WorkerDied, match=sentence):
            method()


def test_a_worker_that_ends_itself_is_named(make):
    envs = make(100, 100)
    envs.reset(seed=0)
    with pytest.raises(WorkerDied, match=rf"^Worker 0 \(process {envs.processes[0].pid}\) ended with exit code 7$"):
        envs.step(np.array([EXIT, STEP]))


@pytest.mark.parametrize(
    "action, sentence", [(RAISE, "ValueError: two lines of text"), (RAISE_UNPICKLABLE, "Local: cannot be sent")]
)
def test_an_error_in_a_worker(make, action, sentence):
    envs = make(100, 100)
    envs.reset(seed=0)
    for _ in range(2):  # each call raises it again
        with pytest.raises(WorkerFailed) as error:
            envs.step(np.array([STEP, action]))
        assert str(error.value) == f"Worker 1 (process {envs.processes[1].pid}) failed: {sentence}"
        assert "in step" in error.value.__notes__[0]


def test_an_error_at_the_start():
    """It is raised from the parent, which makes one environment for its spaces, and from a worker; nothing is left."""
    with pytest.raises(OSError, match="no such"):
        Workers([functools.partial(Tiny, fails=True)])
    with pytest.raises(WorkerFailed) as error:
        Workers([Tiny, functools.partial(Tiny, fails=True)])
    assert re.fullmatch(r"Worker 1 \(process \d+\) failed: OSError: no such thing", str(error.value))
    assert not multiprocessing.active_children()


def test_closing_while_a_worker_is_busy(make, monkeypatch):
    monkeypatch.setattr("envs.workers.GRACE", 1.0)
    envs = make(100, 100)
    envs.reset(seed=0)
    envs.step_async(np.array([WAIT, LOOP]))
    start = time.monotonic()
    envs.close()
    assert time.monotonic() - start < 40, "less than the worker's WAIT, a minute"


PROGRAM = """
import signal, sys, time
print("main module imported", flush=True)
import jax
import numpy as np
sys.path[:0] = [{root!r}, {tests!r}]
from tiny_env import Tiny, LOOP, WAIT
from envs.workers import Workers

def make_env():
    return Tiny(100)

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)
    envs = Workers([make_env] * 2)
    assert __name__ == "__main__" and sys.modules["__main__"].__file__
    modules = envs.call("modules")[0]
    heavy = [name for name in ("jax", "jaxlib", "flax", "optax", "tyro", "mujoco") if name in modules]
    print("heavy", heavy, envs.call("threads"), flush=True)
    envs.reset(seed=0)
    try:
        print("pids", *(process.pid for process in envs.processes), flush=True)
        {action}
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        {after}
        envs.close()
        print("closed", flush=True)
"""


def start(tmp_path, action, after="pass"):
    """-> the running program, the process ids of its workers, its output so far"""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(root=str(TESTS.parent), tests=str(TESTS), action=action, after=after))
    program = subprocess.Popen(
        [sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    lines = []
    while not lines or not lines[-1].startswith("pids"):
        lines.append(program.stdout.readline())
        assert lines[-1], "".join(lines)
    return program, [int(pid) for pid in lines[-1].split()[1:]], "".join(lines[:-1])


@LINUX
@pytest.mark.parametrize("action", ["time.sleep(60)", "envs.step(np.array([WAIT, LOOP]))"], ids=["idle", "busy"])
def test_no_orphans(tmp_path, action):
    """If the parent is killed, its workers end, whether they wait for it or are in the middle of a step."""
    program, pids, written = start(tmp_path, action)
    assert written.count("main module imported") == 1  # not by a worker
    assert "heavy [] ('1', '1')" in written
    time.sleep(0.5)
    assert all(alive(pid) for pid in pids)
    program.kill()
    program.wait()
    wait_until(lambda: not any(alive(pid) for pid in pids))
    wait_until(lambda: not in_session(program.pid))  # nor multiprocessing's own helper


def in_session(session: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(sid) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


@LINUX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_are_left_to_the_parent(tmp_path, number):
    """All processes get them, as from a terminal; the workers continue until they are closed."""
    program, pids, _ = start(tmp_path, "time.sleep(60)", after="print(envs.reset(seed=1)[0].shape)")
    for pid in pids:  # blocked since before the process began: a worker's import of gymnasium takes a while
        status = Path(f"/proc/{pid}/status").read_text()
        assert int(re.search(r"SigBlk:\s*(\w+)", status)[1], 16) >> (number - 1) & 1
    os.killpg(program.pid, number)
    written, _ = program.communicate(timeout=600)
    assert written == "interrupted\n(2, 2)\nclosed\n"
    assert program.returncode == 0 and not any(alive(pid) for pid in pids)


@LINUX
@pytest.mark.parametrize("action", ["pass", "envs.step_async(np.array([WAIT, LOOP]))"])
def test_a_program_that_does_not_close_ends(tmp_path, action):
    program, pids, _ = start(tmp_path, action)
    assert program.communicate(timeout=600) == ("", None)
    assert program.returncode == 0 and not any(alive(pid) for pid in pids)
