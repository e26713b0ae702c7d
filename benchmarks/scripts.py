"""What the other benchmarks share: loading the script that a command names, and taking the time."""

import importlib
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import jax
import numpy as np


def load(path: str, ending: str = ".py") -> ModuleType:
    """The script as a module. A copy in another folder comes before the repository's script of the same name."""
    file = Path(path).resolve()
    if not file.is_file() or not file.name.startswith("ppo_") or not file.name.endswith(ending):
        raise SystemExit(f"{path}: not a script ppo_*{ending}")
    sys.path.insert(0, str(file.parent))
    return importlib.import_module(file.stem)


def milliseconds(functions: Iterable[Callable], rounds: int = 5) -> list[float]:
    """The median time of each function, until its results are on the device.

    In each round they run in turn, so that a drift of the machine's speed affects all alike. Only the second of two
    calls counts: the first may compile, and it refills the caches that the function before has emptied.
    """
    functions, times = list(functions), []
    for _ in range(rounds):
        times.append([])
        for function in functions:
            jax.block_until_ready(function())
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[-1].append(1e3 * (time.perf_counter() - start))
    return np.median(times, axis=0).tolist()
