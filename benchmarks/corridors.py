"""Success over the corridor's length for the five memories on the T-Maze, with an equal budget of steps.

    python benchmarks/corridors.py
    python benchmarks/corridors.py --size small --learning-rates 2e-3 4e-3 8e-3 --total-timesteps 1e6 --at-once 2

Trains what is missing under runs/, resumes what was interrupted, and then prints two tables of the share of episodes
that the final parameters solve with sampled actions, as a mean over seeds with its 95% interval (Student's t): with the
published gates, and with gates that start with long memories (--chrono-steps of AGaLiTe and GaLiTe). The others have no
such gates, so both tables show the same runs of them. It also writes docs/corridors_<size>.csv, a row per seed, and
docs/corridors_<size>.png. All seeds of a setting are one run (--num-seeds of the scripts).

The agents have the published size, or about 45,000 parameters each, for a CPU. With --learning-rates, each memory with
each kind of gates first tries these, at corridor 80 with other seeds, and keeps the one with the highest success over
the whole training. All other settings are the scripts' defaults.
"""

import csv
import dataclasses
import fcntl
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import interval, solved_at

ROOT = Path(__file__).resolve().parents[1]
Model = Literal["agalite", "galite", "gtrxl", "lstm", "gru"]
Gates = Literal["published", "chrono"]
Size = Literal["published", "small"]
TITLES = {"published": "published gates", "chrono": "gates that start with long memories"}
CHRONO_STEPS = {"published": 1, "chrono": 300}
GATED = ("agalite", "galite")  # memories with such gates
# Flags that do not affect the computation.
FREE = "runs_dir resume evaluate checkpoint_interval eval_episodes capture_video track distributed".split()
TRIED = {"length": 80, "seed": 100, "num_seeds": 2}  # where learning rates are tried
HEADS = ["--d-actor=32", "--d-critic=32"]
LAYERS = [*HEADS, "--num-layers=2", "--d-model=32", "--d-head=16", "--num-heads=2"]
SMALL = {
    "agalite": [*LAYERS, "--d-ffc=32"],  # 46,261 parameters
    "galite": [*LAYERS, "--d-ffc=32"],  # 46,429
    "gtrxl": LAYERS,  # 42,501
    "lstm": [*HEADS, "--hidden-size=92"],  # 46,229
    "gru": [*HEADS, "--hidden-size=106"],  # 46,233
}


@dataclasses.dataclass(frozen=True)
class Args:
    models: tuple[Model, ...] = get_args(Model)
    """memories to compare"""
    lengths: tuple[int, ...] = (20, 40, 80, 120, 160, 200)
    """corridors"""
    num_seeds: int = 5
    """seeds of each setting, starting at 1"""
    gates: tuple[Gates, ...] = get_args(Gates)
    """initial gates"""
    size: Size = "published"
    """size of the agents"""
    learning_rates: tuple[float, ...] = ()
    """rates that each memory tries; none: the scripts' own"""
    total_timesteps: str = "1.5e6"
    """environment steps per seed"""
    at_once: int = 1
    """runs at a time, each on its share of the cores"""


@dataclasses.dataclass(frozen=True)
class Run:
    model: str
    gates: str
    length: int
    total_timesteps: str
    seed: int = 1
    num_seeds: int = 1
    size: str = "published"
    learning_rate: float | None = None

    @property
    def script(self) -> str:
        return f"ppo_{self.model}_tmaze"

    @property
    def flags(self) -> list[str]:
        flags = [f"--corridor-len={self.length}", f"--total-timesteps={self.total_timesteps}"]
        flags += [f"--seed={self.seed}", f"--num-seeds={self.num_seeds}"]
        flags += [f"--chrono-steps={CHRONO_STEPS[self.gates]}"] if self.model in GATED else []
        flags += [f"--learning-rate={self.learning_rate}"] if self.learning_rate is not None else []
        return flags + (SMALL[self.model] if self.size == "small" else [])

    def folder(self) -> Path | None:
        """The folder of this run, finished or not; None if nothing was saved."""
        script = importlib.import_module(self.script)
        binding = lambda args: {name: value for name, value in args.items() if name not in FREE}
        wanted = binding(dataclasses.asdict(script.parse_args(self.flags)))
        for path in sorted(Path("runs").glob(f"tmaze__{self.script}__{self.seed}__*/args.json")):
            saved = any((path.parent / "checkpoints").glob("[0-9]*"))
            if saved and binding(json.loads(path.read_text())) == wanted:
                return path.parent
        return None

    def finished(self) -> bool:
        folder = self.folder()
        return folder is not None and (folder / "evaluation.json").exists()

    def begin(self, cores: set[int], said) -> subprocess.Popen:
        """Starts or resumes the run; its output goes into the file `said`."""
        folder = self.folder()
        flags = [f"--resume={folder}"] if folder else self.flags
        command = [sys.executable, str(ROOT / f"{self.script}.py"), *flags]
        pin = lambda: os.sched_setaffinity(0, cores)
        return subprocess.Popen(command, stdout=said, stderr=said, preexec_fn=pin)

    def metrics(self) -> list[dict]:
        return list(csv.DictReader((self.folder() / "metrics.csv").open()))

    def mean_success(self) -> float:
        """The mean over the updates of all seeds in which an episode ended."""
        shares = [row["charts/success_rate"] for row in self.metrics()]
        return float(np.mean([float(share) for share in shares if share]))

    def rows(self) -> list[dict]:
        """The setting and the result of each seed."""
        final, metrics = json.loads((self.folder() / "evaluation.json").read_text()), self.metrics()
        setting = {name: value for name, value in dataclasses.asdict(self).items() if name != "num_seeds"}
        rows = []
        for i, (success, greedy) in enumerate(zip(*(final[x]["success"] for x in ("sampled", "greedy")), strict=True)):
            own = [row for row in metrics if int(row["seed"]) == self.seed + i]
            solved = solved_at(own) if success >= 0.95 else None
            result = {"success": success, "greedy": greedy, "solved_at": solved and solved[0]}
            rows.append(setting | {"seed": self.seed + i} | result)
        return rows


def alone():
    """Excludes another call, which would train in the same folders -> the file to keep open until the end."""
    Path("runs").mkdir(exist_ok=True)
    file = open("runs/corridors.lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit("corridors.py is already running here; wait for it or stop it, what it did is kept") from None
    return file


def train(waiting: list[Run], at_once: int) -> None:
    """Trains all runs. Ctrl-C, SIGTERM or a failed run stops the running ones, which save; the next call resumes."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    shares = [set(share.tolist()) for share in np.array_split(sorted(os.sched_getaffinity(0)), at_once)]
    running = {}
    try:
        with tqdm(total=len(waiting), unit="run") as bar:
            while waiting or running:
                for number in set(range(at_once)) - set(running):
                    if waiting:
                        run, printed = waiting.pop(0), tempfile.TemporaryFile("w+")
                        running[number] = run, printed, run.begin(shares[number], printed)
                time.sleep(1)
                for number, (run, printed, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[number]
                        if process.returncode:
                            printed.seek(0)
                            raise SystemExit(f"{run.script} {' '.join(run.flags)}: {printed.read()[-500:]}")
                        bar.update()
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
    finally:
        for _, _, process in running.values():
            process.terminate()
        for _, _, process in running.values():
            process.wait()


def best(trials: list[Run]) -> float | None:
    """The learning rate with the highest mean success; prints that of each."""
    if len(trials) > 1:
        printed = ", ".join(f"{run.learning_rate:g}: {run.mean_success():.2f}" for run in trials)
        print(f"{trials[0].model}, {TITLES[trials[0].gates]}: mean success while training by learning rate {printed}")
        return max(trials, key=Run.mean_success).learning_rate
    return trials[0].learning_rate


def main(args: Args) -> None:
    cores = len(os.sched_getaffinity(0))
    if not 1 <= args.at_once <= cores:
        raise SystemExit(f"--at-once {args.at_once}: must be 1 to {cores}, the number of cores")
    if not (args.models and args.lengths and args.gates):
        raise SystemExit("--models, --lengths and --gates need at least one value each")
    if not 1 <= args.num_seeds < TRIED["seed"]:
        raise SystemExit(f"--num-seeds {args.num_seeds}: must be 1 to {TRIED['seed'] - 1}, as trials have those beyond")
    os.chdir(ROOT)
    with alone():
        compare(args)


def compare(args: Args) -> None:
    """Trains what is missing, and prints, writes and draws the results."""
    run_of = functools.partial(Run, total_timesteps=args.total_timesteps, size=args.size)
    kinds = [(model, gates) for model in args.models for gates in (args.gates if model in GATED else ("published",))]
    rates = args.learning_rates or (None,)
    trials = [[run_of(*kind, **TRIED, learning_rate=rate) for rate in rates] for kind in kinds]
    if len(rates) > 1:
        train([run for tried in trials for run in tried if not run.finished()], args.at_once)
    chosen = [(*kind, best(tried)) for kind, tried in zip(kinds, trials, strict=True)]
    runs = [
        run_of(model, gates, length, num_seeds=args.num_seeds, learning_rate=rate)
        for length in args.lengths for model, gates, rate in chosen
    ]  # fmt: skip
    train([run for run in runs if not run.finished()], args.at_once)

    rows = [row for run in runs for row in run.rows()]
    with open(f"docs/corridors_{args.size}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    figure = Figure(figsize=(4.5 * len(args.gates), 3.5), layout="constrained")
    for axis, gates in zip(figure.subplots(1, len(args.gates), squeeze=False)[0], args.gates, strict=True):
        print(f"\n| {TITLES[gates]} | " + " | ".join(map(str, args.lengths)) + " |")
        print("| --- " * (len(args.lengths) + 1) + "|")
        for number, model in enumerate(args.models):
            cells = []
            for length in args.lengths:
                own = [row["success"] for row in rows if (row["model"], row["length"]) == (model, length)
                       and row["gates"] == (gates if model in GATED else "published")]  # fmt: skip
                cells.append(interval(own))
            mean, half = np.array(cells).T
            print(f"| {model} | " + " | ".join(f"{m:.2f} ± {h:.2f}" for m, h in cells) + " |")
            beside = np.array(args.lengths) + 1.5 * number  # otherwise the intervals would hide each other
            axis.errorbar(beside, mean, half, label=model, marker="o", markersize=3, capsize=2, alpha=0.8)
        axis.set(title=TITLES[gates], xlabel="corridor length", ylabel="success", ylim=(-0.05, 1.05))
        axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(f"docs/corridors_{args.size}.png", dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Args))
