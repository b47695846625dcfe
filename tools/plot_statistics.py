#!/usr/bin/env python
"""Draws batch statistics against their windows (SMAS) and EMA (EMAS), one column a run.

    tools/plot_statistics.py output/bn output/mabn --output statistics.png

The runs are output folders of trainings with MODEL.MABN.LOG_PERIOD set. The paper argues (section 3)
that at small batches the statistics of the backward, g and psi, are as noisy as those of the forward,
and that an average over a window, other than the EMA, follows the weights closely enough to be used.
"""

import argparse
import sys
from pathlib import Path

from mabn_d2.engine.hooks.log_statistics import forward_order
from mabn_d2.visualization import read_metrics

STYLES = {
    "batch": {"color": "0.7", "linewidth": 0.8},
    "window": {"color": "tab:blue", "linewidth": 1.5},
    "ema": {"color": "tab:red", "linewidth": 1.5},
}


def read_statistics(run):
    """Return {layer: {statistic: {kind: [(iteration, value), ...]}}} of a run's metrics.json."""
    layers = {}
    for record in read_metrics(run):
        for key, value in record.items():
            if key.startswith("statistics/"):
                _, layer, statistic, kind = key.split("/")
                series = layers.setdefault(layer, {}).setdefault(statistic, {})
                series.setdefault(kind, []).append((record["iteration"] + 1, value))
    return layers


def plot(columns, output):
    """Draw {title: {statistic: {kind: series}}} into the picture `output`."""
    from mabn_d2.visualization import plt

    rows = max(map(len, columns.values()))
    figure, axes = plt.subplots(
        rows,
        len(columns),
        figsize=(5 * len(columns), 2 * rows),
        squeeze=False,
        layout="constrained",
        sharex=True,
    )
    for column, (title, statistics) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        for axis in column[len(statistics) :]:
            axis.set_axis_off()
        for axis, (statistic, kinds) in zip(column, statistics.items()):
            for kind, series in kinds.items():
                axis.plot(*zip(*series), label=kind, **STYLES[kind])
            axis.set_ylabel(statistic)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        column[len(statistics) - 1].set_xlabel("iteration")
    figure.savefig(output, dpi=100)
    plt.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a training")
    parser.add_argument("--layer", help="name of a norm layer; default: the middle one logged")
    parser.add_argument("--output", default="statistics.png", help="default: statistics.png")
    args = parser.parse_args(arguments)
    columns = {}
    for run in args.runs:
        try:
            layers = read_statistics(run)
        except OSError as error:
            sys.exit(f"plot_statistics.py: {run} is no output folder of a training: {error}")
        names = sorted(sorted(layers), key=forward_order)
        layer = args.layer or (names[len(names) // 2] if names else None)
        if layer not in layers:
            sys.exit(
                f"plot_statistics.py: {run} has no statistics of {args.layer or 'any layer'}: "
                + (
                    f"use one of {', '.join(names)}"
                    if names
                    else "train with MODEL.MABN.LOG_PERIOD"
                )
            )
        columns[f"{Path(run).name}\n{layer}"] = layers[layer]
    plot(columns, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
