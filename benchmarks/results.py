"""A table and curves of runs, from their folders.

    python benchmarks/results.py comparison runs/mine/tmaze__*

writes comparison.md, a row per seed, and comparison.png: the outcome over steps and over minutes, and the length of
episodes over steps. Runs whose script or flags differ have different colours, and each flag that differs has a column.
A thin line is a seed, a thick line the mean of the seeds (over steps only). Curves are moving averages over 2% of a
run's episodes, at least 100; they start at 20. A second table has the outcome in training, sampled actions: its mean
over the episodes of all seeds in each tenth of the longest run. Two settings are also compared: the difference of their
means over seeds, with its 95% interval (Welch's).

"Solved", on the T-Maze, is the first update with success >= 0.95 over the last 200 finished episodes, confirmed by the
final evaluation with sampled actions; the median counts a seed that is not solved as infinitely late. Minutes include
compilation of the update, and all seeds of a run with --num-seeds. ± is a 95% interval over seeds (Student's t).
"""

import collections
import csv
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy import stats

# The results of the evaluation that measure a task. The first one is drawn.
OUTCOMES = {"tmaze": ["success"], "MysteryPath": ["episodic_return", "success"], "Craftax": ["score"]}
USAGE = "usage: python benchmarks/results.py NAME RUN_FOLDER [RUN_FOLDER ...]"
# Flags that may differ between runs of one setting: the seed, and what does not change the training.
FREE = {"runs_dir", "seed", "num_seeds", "distributed", "checkpoint_interval", "resume", "evaluate", "eval_episodes"}
FREE |= {"capture_video", "track"}


def recent(rows: list[dict], metric: str, episodes: int) -> Iterator[tuple[dict, float, int]]:
    """-> each update in which episodes have ended, the metric's mean over the last episodes, and their number.

    Updates are whole: the window has the fewest last updates with at least `episodes` episodes, or all of them.
    """
    window: list[tuple[float, float]] = []  # (episodes, sum of the metric) of an update
    for row in rows:
        ended = float(row["charts/episodes"])
        if ended:
            window.append((ended, ended * float(row[metric])))
            while sum(n for n, _ in window[1:]) >= episodes:
                window.pop(0)
            total = sum(n for n, _ in window)
            yield row, sum(x for _, x in window) / total, int(total)


def solved_at(rows: list[dict], episodes: int = 200, success: float = 0.95) -> tuple[int, float] | None:
    """-> global_step and minutes of the first update with this success over the last `episodes` episodes, if any."""
    for row, mean, number in recent(rows, "charts/success_rate", episodes):
        if number >= episodes and mean >= success:
            return int(row["global_step"]), float(row["elapsed"]) / 60
    return None


def interval(values) -> tuple[float, float]:
    """Mean and half of its 95% interval; NaN for a single value."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), float(half)


def cell(outcome: str, values: list[float]) -> str:
    """The mean of the values, with its interval if there are several."""
    form = ".1f" if outcome == "score" else ".3f"
    return " ± ".join(f"{x:{form}}" for x in interval(values)[: len(values)])


def metric_of(outcome: str) -> str:
    """The column of metrics.csv."""
    return "charts/success_rate" if outcome == "success" else f"charts/{outcome}"


def in_training(seeds: list[list[dict]], outcome: str, end: int) -> list[str]:
    """The mean over the episodes of all seeds in each tenth of `end` steps; empty if none ended there."""
    episodes, sums = np.zeros(10), np.zeros(10)
    for row in (row for rows in seeds for row in rows if float(row["charts/episodes"])):
        tenth = min(10 * (int(row["global_step"]) - 1) // end, 9)
        episodes[tenth] += float(row["charts/episodes"])
        sums[tenth] += float(row["charts/episodes"]) * float(row[metric_of(outcome)])
    return [cell(outcome, [total / n]) if n else "" for total, n in zip(sums, episodes, strict=True)]


def difference(outcome: str, first: list[float], second: list[float]) -> str:
    """The difference of two means with Welch's 95% interval."""
    form = ".1f" if outcome == "score" else ".3f"
    a, b = (np.var(x, ddof=1) / len(x) for x in (first, second))
    degrees = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1)) if a + b else 1
    half = stats.t.ppf(0.975, degrees) * math.sqrt(a + b)
    return f"{np.mean(first) - np.mean(second):{form}} ± {half:{form}}"


def table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the head."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def draw(settings: dict[str, list[list[dict]]], outcome: str, path: Path):
    """A colour per setting, a thin line per seed, a thick one for their mean."""
    metric = metric_of(outcome)
    panels = [(metric, "global_step"), (metric, "elapsed")]
    if len({row["charts/episodic_length"] for seeds in settings.values() for rows in seeds for row in rows}) > 2:
        panels.append(("charts/episodic_length", "global_step"))  # not on Memory Maze, where all are equally long
    figure = Figure(figsize=(4 * len(panels), 4), layout="constrained")
    for axis, (shown, over) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for number, (name, seeds) in enumerate(settings.items()):
            points = []
            for rows in seeds:
                width = max(100, sum(int(row["charts/episodes"]) for row in rows) // 50)
                points.append([(float(row[over]), y) for row, y, n in recent(rows, shown, width) if n >= 20])
            curves = [np.array(seed).T / [[60 if over == "elapsed" else 1], [1]] for seed in points if seed]
            for x, y in curves:
                axis.plot(x, y, f"C{number}", linewidth=0.8, alpha=0.5)
            if over == "global_step" and curves:  # minutes depend on what else the machine does
                x = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 200)
                mean = np.mean([np.interp(x, *curve) for curve in curves], axis=0)
                axis.plot(x, mean, f"C{number}", linewidth=2, label=name)
        axis.set(xlabel={"elapsed": "minutes"}.get(over, "environment steps"))
        axis.set(ylabel=shown.removeprefix("charts/").replace("_", " "))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)


def main(name: str, folders: list[str]):
    if Path(name).is_dir():
        raise SystemExit(f"{name} is a folder: {USAGE}")
    if missing := [folder for folder in folders if not (Path(folder) / "args.json").exists()]:
        raise SystemExit(f"{missing[0]}: not the folder of a run, it has no args.json")
    runs = [(json.loads((Path(folder) / "args.json").read_text()), Path(folder)) for folder in folders]
    flags = [flag for flag in dict.fromkeys(flag for args, _ in runs for flag in args) if flag not in FREE]
    differ = [flag for flag in flags if len({str(args[flag]) for args, _ in runs if flag in args}) > 1]
    env_ids = {"tmaze" if "corridor_len" in args else args.get("env_id", "another") for args, _ in runs}
    tasks = {next((task for task in OUTCOMES if env_id.startswith(task)), env_id) for env_id in env_ids}
    if len(tasks) > 1:
        raise SystemExit(f"runs of several tasks: {', '.join(sorted(env_ids))}")
    task = tasks.pop()
    outcomes = OUTCOMES.get(task, ["episodic_return"])

    settings = collections.defaultdict(list)  # values of the flags that differ -> (seed, rows, evaluation), ...
    for args, folder in sorted(runs, key=lambda run: run[0]["seed"]):
        if not (folder / "evaluation.json").exists():
            raise SystemExit(f"{folder}: has no evaluation.json. Let the run end, or run its script with --evaluate")
        final = json.loads((folder / "evaluation.json").read_text())
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        for i in range(args.get("num_seeds", 1)):
            seed = args["seed"] + i
            own = [row for row in rows if int(row.get("seed", seed)) == seed]
            results = {(kind, x): final[kind][x][i] for x in outcomes for kind in ("sampled", "greedy")}
            setting = settings[tuple(str(args.get(flag, "")) for flag in differ)]
            if any(seed == other for other, *_ in setting):
                raise SystemExit(f"{folder}: another run has the same flags and seed {seed}")
            setting.append((seed, own, results))

    cells = [[*differ, "seed", "steps", "minutes"]]
    if task == "tmaze":
        cells[0][-1:] = ["solved at step", "minutes until solved"]
    cells[0] += [f"{x.replace('episodic_', '')}, {kind}" for x in outcomes for kind in ("sampled", "greedy")]
    for values, seeds in sorted(settings.items()):
        steps = []
        for seed, rows, results in seeds:
            minutes = [f"{float(rows[-1]['elapsed']) / 60:.1f}"]
            if task == "tmaze":
                solved = solved_at(rows) if results["sampled", "success"] >= 0.95 else None
                steps.append(solved[0] if solved else float("inf"))
                minutes = [f"{solved[0]:,}", f"{solved[1]:.1f}"] if solved else ["not", "-"]
            trained = f"{int(rows[-1]['global_step']):,}"
            cells.append([*values, str(seed), trained, *minutes, *(cell(x, [y]) for (_, x), y in results.items())])
        if len(seeds) > 1:
            median = statistics.median(steps or [0])
            count = f"{sum(step < float('inf') for step in steps)} of {len(steps)}"
            solved_cell = [count + (f", median {median:,.0f}" if median < float("inf") else "")] if steps else []
            means = [cell(key[1], [results[key] for *_, results in seeds]) for key in seeds[0][2]]
            cells.append([*values, "**all**", "", *solved_cell, "", *means])
    named = {}
    for values, seeds in sorted(settings.items()):
        labels = [x if flag == "exp_name" else f"{flag} {x}" for flag, x in zip(differ, values, strict=True) if x]
        named[", ".join(labels) or runs[0][0]["exp_name"]] = seeds
    curves = {label: [rows for _, rows, _ in seeds] for label, seeds in named.items()}
    end = max(int(rows[-1]["global_step"]) for seeds in curves.values() for rows in seeds)
    tenths = [[f"steps, of {end:,}", *(f"to {10 * i}%" for i in range(1, 11))]]
    tenths += [[label, *in_training(seeds, outcomes[0], end)] for label, seeds in curves.items()]
    text = f"Made by `python benchmarks/results.py {name} ...` from the folders of the runs.\n\n{table(cells)}\n\n"
    if len(named) == 2 and all(len(seeds) > 1 for seeds in named.values()):
        (one, first), (other, second) = named.items()
        both = [(key, [[results[key] for *_, results in seeds] for seeds in (first, second)]) for key in first[0][2]]
        shown = [f"{x.replace('episodic_', '')}, {kind}: {difference(x, *pair)}" for (kind, x), pair in both]
        text += f"{one} minus {other}: {'; '.join(shown)}.\n\n"
    text += f"Mean {outcomes[0].replace('episodic_', '')} of the episodes in training:\n\n{table(tenths)}"
    Path(f"{name}.md").write_text(text + "\n")
    draw(curves, outcomes[0], Path(f"{name}.png"))
    print(text)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(USAGE)
    main(sys.argv[1], sys.argv[2:])
