"""The table of results in docs/tmaze.md and its curves, from the folders that runs have left.

    python benchmarks/results.py runs/tmaze__*

prints the table and draws docs/tmaze_curves.png: success and length of the episodes, one line per seed.

"Solved" is the first update with success >= 0.95 over the last 200 finished episodes, confirmed by the final evaluation
with sampled actions; the minutes are those since the start of training, compilation included.
"""

import csv
import itertools
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def solved_at(rows: list[dict], episodes: int = 200, success: float = 0.95) -> tuple[int, float] | None:
    """-> global_step and minutes of the first update with that success over the last so many episodes, if there is one.

    Updates are whole: the window is of the fewest last updates that hold at least `episodes` episodes.
    """
    window: list[tuple[float, float]] = []  # (episodes, successes) of an update
    for row in rows:
        ended = float(row["charts/episodes"])
        window.append((ended, ended * float(row["charts/success_rate"] or 0)))
        while sum(n for n, _ in window[1:]) >= episodes:
            window.pop(0)
        total = sum(n for n, _ in window)
        if total >= episodes and sum(k for _, k in window) >= success * total:
            return int(row["global_step"]), float(row["elapsed"]) / 60
    return None


def draw(curves: dict[tuple, list[dict]], path: Path):
    """Success and length of the episodes of each update, a line a run, named by what tells it from the others."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    differs = [len(set(column)) > 1 for column in zip(*curves, strict=True)]
    name_of = lambda setting: ", ".join(itertools.compress(setting, differs))
    for axis, name in zip(figure.subplots(1, 2), ("charts/success_rate", "charts/episodic_length"), strict=True):
        for setting, rows in curves.items():
            points = [(int(row["global_step"]), float(row[name])) for row in rows if row[name]]
            axis.plot(*zip(*points, strict=True), label=name_of(setting), linewidth=1, alpha=0.8)
        axis.set(xlabel="environment steps", ylabel=name.removeprefix("charts/").replace("_", " "))
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)


def main(folders: list[str]):
    curves = {}
    print("| script | corridor | chrono steps | seed | solved at step | minutes | final success, sampled | greedy |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    runs = [(json.loads((Path(folder) / "args.json").read_text()), Path(folder)) for folder in folders]
    for args, folder in sorted(runs, key=lambda run: (run[0]["exp_name"], run[0]["corridor_len"], run[0]["seed"])):
        final = json.loads((folder / "evaluation.json").read_text())
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        for i in range(args["num_seeds"]):
            seed, sampled, greedy = args["seed"] + i, final["sampled"]["success"][i], final["greedy"]["success"][i]
            chrono = args.get("chrono_steps", "-")
            setting = args["exp_name"], f"corridor {args['corridor_len']}", f"chrono {chrono}", f"seed {seed}"
            curves[setting] = own = [row for row in rows if int(row["seed"]) == seed]
            solved = solved_at(own)
            solved = solved if sampled >= 0.95 else None
            step, minutes = (f"{solved[0]:,}", f"{solved[1]:.1f}") if solved else ("not", "-")
            print(f"| {args['exp_name']} | {args['corridor_len']} | {chrono} | {seed} ", end="")
            print(f"| {step} | {minutes} | {sampled:.3f} | {greedy:.3f} |")
    draw(curves, Path(__file__).resolve().parents[1] / "docs" / "tmaze_curves.png")


if __name__ == "__main__":
    main(sys.argv[1:])
