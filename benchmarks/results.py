"""The table of results in README, from the folders that runs have left.

    python benchmarks/results.py runs/tmaze__*

"Solved" is the first update with success >= 0.95 over the last 200 finished episodes, confirmed by the final evaluation
with sampled actions; the minutes are those since the start of training, compilation included.
"""

import csv
import json
import sys
from pathlib import Path


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


def main(folders: list[str]):
    print("| corridor | gates | seed | solved at step | minutes | final success, sampled | greedy |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for folder in map(Path, folders):
        args = json.loads((folder / "args.json").read_text())
        final = json.loads((folder / "evaluation.json").read_text())
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        for i in range(args["num_seeds"]):
            seed, sampled, greedy = args["seed"] + i, final["sampled"]["success"][i], final["greedy"]["success"][i]
            solved = solved_at([row for row in rows if int(row["seed"]) == seed])
            solved = solved if sampled >= 0.95 else None
            step, minutes = (f"{solved[0]:,}", f"{solved[1]:.1f}") if solved else ("not", "-")
            setting = f"| {args['corridor_len']} | {args['gate_init']} | {seed} "
            print(f"{setting}| {step} | {minutes} | {sampled:.3f} | {greedy:.3f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
