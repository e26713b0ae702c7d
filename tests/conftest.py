"""One folder for the compiled programs of a test session, shared by all of its processes."""

import os
import shutil
import tempfile


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # not in the workers of pytest-xdist, which inherit the environment
        os.environ["COMPILED_FOR_TESTS"] = tempfile.mkdtemp()


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["COMPILED_FOR_TESTS"], ignore_errors=True)
