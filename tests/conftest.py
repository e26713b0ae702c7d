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
        os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"
    # The processes that tests start must not inherit that nohup or a shell's background job ignores a signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["COMPILED_FOR_TESTS"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """After each file of tests, since hundreds of programs take gigabytes."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
