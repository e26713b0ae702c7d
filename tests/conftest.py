"""For all tests: one folder for compiled programs, and in memory only those of one test file."""

import gc
import os
import shutil
import signal
import tempfile

import pytest


def pytest_configure(config):
    """Its settings hold for all processes of a test session, including the scripts that tests start."""
    if not hasattr(config, "workerinput"):  # not in the workers of pytest-xdist, which inherit the environment
        config.compiled = tempfile.mkdtemp()
        # Programs that take 0.1 s or longer to compile are kept for all processes that have the same XLA_FLAGS. Never
        # in the user's folder: tests kill processes while they write.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.compiled
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        # By default, some GPUs multiply float32 with ten bits of mantissa (TF32).
        os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")
    # nohup and background jobs of a shell ignore signals; the processes that tests start must not inherit this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(config.compiled, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """The longest files come first; otherwise one worker would still run the last of them when others are idle."""
    longest = "test_runs test_ppo test_memorymaze_scripts test_learning test_faults test_docs test_cli test_craftax"
    longest = f"{longest} test_distributed test_memory test_wrappers test_memorymaze_learning test_agalite".split()
    items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """After each test file, since hundreds of programs take gigabytes."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
