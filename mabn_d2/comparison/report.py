"""Tables and pictures of a comparison."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.image import imread
from tabulate import tabulate

from ..checkpoint.io import atomic_file
from ..visualization import new_figure, read_metrics, save_figure
from .runs import METRICS

NAMES = [f"{task} {ap}" for task, ap in METRICS]
COLUMNS = [*NAMES, "s/iteration", "iterations", "device", "torch"]
Results = Mapping[tuple[str, int], Mapping[str, Any]]


def write_runs(results: Results, path: Path) -> None:
    """Write a CSV file with one line for each run of {(row, seed): result}."""
    lines: list[list[object]] = [["row", "seed", *COLUMNS]]
    lines += [[*run, *(result[name] for name in COLUMNS)] for run, result in results.items()]
    with atomic_file(path) as file:
        file.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return the mean and, of several values, the sample standard deviation."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def write_table(results: Results, path: Path) -> None:
    """Write a Markdown table with one line for each row of {(row, seed): result}."""
    lines = []
    for row in dict.fromkeys(row for row, _ in results):
        runs = [result for (name, _), result in results.items() if name == row]
        cells = [mean_and_deviation([run[name] for run in runs]) for name in NAMES]
        seconds = statistics.mean(run["s/iteration"] for run in runs)
        lines.append([row, len(runs), runs[0]["iterations"], *cells, f"{seconds:.3f}"])
    headers = ["norm:images", "seeds", "iterations", *NAMES, "s/iteration"]
    text = tabulate(lines, headers, tablefmt="github", disable_numparse=True)
    with atomic_file(path) as file:
        file.write(f"{text}\n".encode())


def plot_curves(folders: Mapping[str, Sequence[str]], path: Path) -> None:
    """Plot the total loss and AP of {row: [folder of a run, ...]} against iterations."""
    figure, axes = new_figure(1, 3, size=(13, 4))
    names = (("total_loss", "loss"), ("bbox/AP", "box AP (%)"), ("segm/AP", "mask AP (%)"))
    for number, (row, runs) in enumerate(folders.items()):
        for k, records in enumerate(map(read_metrics, runs)):
            for axis, (name, label) in zip(axes, names, strict=True):
                points = [(r["iteration"] + 1, r[name]) for r in records if name in r]
                axis.plot(*zip(*points), color=f"C{number}", alpha=0.8, label=None if k else row)
                axis.set(xlabel="iterations", ylabel=label)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_yscale("log")
    save_figure(figure, path, dpi=90)


def draw_predictions_of_rows(folders: Mapping[str, str], path: Path) -> None:
    """Draw the predictions of {row: folder of a run}, one below the other."""
    figure, axes = new_figure(len(folders), size=(8, 3.4 * len(folders)), squeeze=False)
    for axis, (row, folder) in zip(axes.flat, folders.items(), strict=True):
        axis.imshow(imread(Path(folder) / "predictions.png"))
        axis.set_title(row)
        axis.set_axis_off()
    save_figure(figure, path, dpi=60)
