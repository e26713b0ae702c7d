"""Tables and curves of T-Maze runs, from the folders that they have left.

    python benchmarks/results.py tmaze runs/tmaze__ppo_agalite_tmaze__*

writes docs/results/tmaze.md, a row per seed, and docs/results/tmaze.png: success over steps and over minutes, and the
length of episodes. Runs whose script or flags differ get a colour each, and a column for each flag that differs.

"Solved" is the first update with success >= 0.95 over the last 200 finished episodes, confirmed by the final evaluation
with sampled actions; the minutes are those since the start of training, compilation included.
"""

import csv
import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

ROOT = Path(__file__).resolve().parents[1]
PANELS = (
    ("charts/success_rate", "global_step", "environment steps"),
    ("charts/success_rate", "elapsed", "minutes"),
    ("charts/episodic_length", "global_step", "environment steps"),
)
# Flags that change the computation of a single seed no more than the seed does.
FREE = "seed num_seeds checkpoint_interval resume evaluate eval_episodes capture_video track distributed".split()


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


def draw(curves: list[tuple[str, list[dict]]], path: Path):
    """A line per seed, in the colour of its setting."""
    settings = list(dict.fromkeys(setting for setting, _ in curves))
    figure = Figure(figsize=(12, 3.2 if len(settings) == 1 else 4), layout="constrained")
    for axis, (metric, over, label) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        shown = set()
        for setting, rows in curves:
            points = [
                (float(row[over]) / (60 if over == "elapsed" else 1), float(row[metric])) for row in rows if row[metric]
            ]
            name = None if setting in shown else setting
            axis.plot(*zip(*points, strict=True), f"C{settings.index(setting)}", label=name, linewidth=1, alpha=0.7)
            shown.add(setting)
        axis.set(xlabel=label, ylabel=metric.removeprefix("charts/").replace("_", " "))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
    if len(settings) > 1:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120)


def main(name: str, folders: list[str]):
    runs = [(json.loads((Path(folder) / "args.json").read_text()), Path(folder)) for folder in folders]
    flags = dict.fromkeys(flag for args, _ in runs for flag in args if flag not in FREE)
    differ = [flag for flag in flags if len({str(args.get(flag)) for args, _ in runs}) > 1]
    lines = ["| " + " | ".join([*differ, "seed", "solved at step", "minutes", "success, sampled", "greedy"]) + " |"]
    lines.append("| --- " * (len(differ) + 5) + "|")
    curves, steps_to_solve = [], []
    for args, folder in sorted(runs, key=lambda run: (*(str(run[0].get(flag)) for flag in differ), run[0]["seed"])):
        final = json.loads((folder / "evaluation.json").read_text())
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        for i in range(args["num_seeds"]):
            seed, sampled, greedy = args["seed"] + i, final["sampled"]["success"][i], final["greedy"]["success"][i]
            own = [row for row in rows if int(row["seed"]) == seed]
            values = [str(args.get(flag, "-")) for flag in differ]
            named = [x if flag == "exp_name" else f"{flag} {x}" for flag, x in zip(differ, values, strict=True)]
            curves.append((", ".join(named), own))
            solved = solved_at(own) if sampled >= 0.95 else None
            steps_to_solve.append(solved[0] if solved else float("inf"))
            step, minutes = (f"{solved[0]:,}", f"{solved[1]:.1f}") if solved else ("not", "-")
            lines.append(
                "| " + " | ".join([*values, str(seed), step, minutes, f"{sampled:.3f}", f"{greedy:.3f}"]) + " |"
            )
    count, median = sum(step < float("inf") for step in steps_to_solve), statistics.median(steps_to_solve)
    summary = f"Solved: {count} of {len(steps_to_solve)}" + (f", median {median:,.0f} steps." if not differ else ".")
    text = f"Made by `python benchmarks/results.py {name} ...` from the folders of the runs.\n\n{summary}\n\n"
    folder = ROOT / "docs" / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.md").write_text(text + "\n".join(lines) + "\n")
    draw(curves, folder / f"{name}.png")
    print(text + "\n".join(lines))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("usage: python benchmarks/results.py NAME RUN_FOLDER [RUN_FOLDER ...]")
    main(sys.argv[1], sys.argv[2:])
