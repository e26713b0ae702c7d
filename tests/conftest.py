"""For all tests: one folder for compiled programs, and no more of them in memory than one file of tests needs."""

import gc
import os
import shutil
import signal
import tempfile

import pytest


def pytest_configure(config):
    """What it sets is shared by all processes of a test session, the scripts that tests start included."""
    if not hasattr(config, "workerinput"):  # not in the workers of pytest-xdist, which inherit the environment
        os.environ["COMPILED_FOR_TESTS"] = tempfile.mkdtemp()
        # Some GPUs multiply float32 with ten bits of mantissa (TF32), unless asked not to.
        os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")
    # The processes that tests start must not inherit that nohup or a shell's background job ignores a signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["COMPILED_FOR_TESTS"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Files that take longest come first, or one process would work on the last of them while another has ended."""
    longest = "test_runs test_ppo test_memorymaze_scripts test_learning test_faults test_docs test_cli".split()
    items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """After each file of tests, since hundreds of programs take gigabytes."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
