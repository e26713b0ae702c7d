"""Several processes that train together must equal one, and stop together. Here: two on this machine, over gloo."""

import os
import signal
import socket

import pytest
from cli import BATCH, ENVIRONMENT, checkpoint, finish, folder_of, lasting, rows, run, start, steps, wait_for_row
from common import FIRST, assert_close

pytestmark = pytest.mark.slow

# Otherwise Adam and the normalisation scale up the rounding errors of tiny gradients and advantages.
EXACT = "--adam-eps", "1e-3", "--no-norm-adv"


def start_two(script, *flags, **options):
    """Starts the two processes of a distributed run, as Open MPI's mpirun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    job = ENVIRONMENT | {"JAX_COORDINATOR_ADDRESS": address, "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1"}
    job |= {"OMPI_COMM_WORLD_SIZE": "2"}
    rank = lambda i: {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)}
    return [start(script, "--distributed", *flags, env=job | rank(i), **options) for i in range(2)]


@pytest.mark.parametrize("script", FIRST)
def test_two_processes_equal_one(script, tmp_path):
    """After two updates, and resumed for two more, two processes have the parameters and metrics of one."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    run(script, "--total-timesteps", 4 * BATCH, "--checkpoint-interval", 2, *EXACT, cwd=one)
    for process in start_two(script, "--total-timesteps", 2 * BATCH, *EXACT, cwd=two):
        finish(process)
    ours, expected = folder_of(two), folder_of(one)  # one folder: both processes agree on its name
    for updates in (2, 4):
        assert steps(ours)[-1] == updates
        states = [checkpoint(folder, updates)["train_state"] for folder in (ours, expected)]
        assert_close(states[0], states[1], atol=1e-4)
        assert len(rows(ours)) == updates  # of process 0 alone
        for row, other in zip(lasting(ours), lasting(expected), strict=False):
            assert {k: float(v or 0) for k, v in row.items()} == pytest.approx(
                {k: float(v or 0) for k, v in other.items()}, abs=1e-3
            )
        if updates == 2:
            for process in start_two(script, "--resume", ours, "--total-timesteps", 4 * BATCH, cwd=two, small=False):
                finish(process)


@pytest.mark.parametrize("script", FIRST)
def test_a_process_without_a_device_is_refused(script, tmp_path):
    """If a minibatch has fewer environments than there are processes, all of them say so and end."""
    for process in start_two(script, "--num-minibatches", 4, cwd=tmp_path):
        _, err = finish(process, expect=1)
        assert "--distributed can use only 1 of 2 devices: --num-envs" in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", FIRST)
def test_signal_to_one_stops_both(script, tmp_path):
    """SIGTERM to one of the processes stops both after the same update, with a checkpoint of it."""
    processes = start_two(script, "--total-timesteps", 5000 * BATCH, cwd=tmp_path)
    wait_for_row(processes[0], tmp_path, 5)
    os.kill(processes[1].pid, signal.SIGTERM)
    printed = [finish(process, expect=128 + signal.SIGTERM)[0] for process in processes]
    folder = folder_of(tmp_path)
    last = len(rows(folder))
    assert 5 <= last < 5000 and steps(folder)[-1] == last
    assert all(f"after update {last}" in out for out in printed)
