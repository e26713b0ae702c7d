"""Learning curves of several runs in one image: a colour for each experiment, a thin line for each run, their mean.

    python benchmarks/curves.py docs/craftax_curves.png charts/score runs/Craftax-Classic*

takes the metric named from metrics.csv of the folders, over environment steps. Runs of one experiment (--exp-name)
belong together; the mean is over those updates that all of its runs have reached.
"""

import argparse
import collections
import csv
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter


def curves_of(folder: Path, metric: str) -> list[np.ndarray]:
    """-> of each seed its global_step and the metric, NaN where no episode ended, (2, updates)."""
    curves = collections.defaultdict(list)
    for row in csv.DictReader((folder / "metrics.csv").open()):
        curves[row["seed"]].append((float(row["global_step"]), float(row[metric] or "nan")))
    return [np.array(curve).T for curve in curves.values()]


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the last `width` updates that have a value."""
    windows = (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))
    return np.array([window[~np.isnan(window)].mean() if not np.isnan(window).all() else np.nan for window in windows])


def main(path: str, metric: str, folders: list[str], window: float):
    experiments = collections.defaultdict(list)
    for folder in map(Path, folders):
        experiments[json.loads((folder / "args.json").read_text())["exp_name"]] += curves_of(folder, metric)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    for number, (name, curves) in enumerate(sorted(experiments.items())):
        width = max(1, int(window * len(curves[0][0])))
        smoothed = [smooth(values, width) for _, values in curves]
        for (steps, _), values in zip(curves, smoothed, strict=True):
            axis.plot(steps, values, color=f"C{number}", linewidth=0.7, alpha=0.5)
        common = min(map(len, smoothed))
        mean = np.mean([values[:common] for values in smoothed], axis=0)
        runs = f"{len(curves)} run{'s' * (len(curves) > 1)}"
        axis.plot(curves[0][0][:common], mean, color=f"C{number}", linewidth=2, label=f"{name}, {runs}")
    axis.set(xlabel="environment steps", ylabel=metric.removeprefix("charts/").replace("_", " "))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="the file to write")
    parser.add_argument("metric", help="a column of metrics.csv")
    parser.add_argument("folders", nargs="+", help="of runs")
    parser.add_argument("--window", type=float, default=0.02, help="share of a run that a point is the mean of")
    args = parser.parse_args()
    main(args.image, args.metric, args.folders, args.window)
