"""How long a script takes from the command to the first row of metrics.csv, in three parts.

    python benchmarks/first_update.py ppo_agalite_tmaze.py [its flags]

Starts it --repeats times (3) in an empty folder, without a cache of compiled programs, and prints medians: imports, up
to "Compiling"; initialisation, compiled and run; and the first update, compiled and run.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def first_row(script: Path, flags: list[str]) -> list[float]:
    """-> seconds of the three parts."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        start, times = time.perf_counter(), []
        command = [sys.executable, "-u", script.resolve(), *flags]
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        for line in process.stdout:
            if line.startswith("Compiling") or " parameters, " in line:
                times.append(time.perf_counter() - start)
            if " parameters, " in line:
                break
        lines = lambda: [path.read_text().count("\n") for path in Path(folder).glob("runs/*/metrics.csv")]
        while process.poll() is None and max(lines(), default=0) < 2:  # the header and the first row
            time.sleep(0.05)
        times.append(time.perf_counter() - start)
        has_row = max(lines(), default=0) >= 2
        process.kill()
        process.communicate()
        errors.seek(0)
        if not has_row or len(times) != 3:
            raise SystemExit(f"the script ended before its first row: {errors.read()}")
    return [times[0], times[1] - times[0], times[2] - times[1]]


if __name__ == "__main__":
    # No abbreviations: the scripts' --r is not --repeats.
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    parser.add_argument("script", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    args, flags = parser.parse_known_args()
    parts = [
        statistics.median(part)
        for part in zip(*(first_row(args.script, flags) for _ in range(args.repeats)), strict=True)
    ]
    print(
        "imports {:.1f} s, initialisation {:.1f} s, first update {:.1f} s".format(*parts),
        f"together {sum(parts):.1f} s",
    )
