"""Draws what the hook `LogStatistics` wrote: batch statistics, their windows and their averages."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..visualization import new_figure, picture_formats, read_metrics, save_figure
from .errors import ConfigError
from .hooks.log_statistics import forward_order

STYLES = {
    "batch": {"color": "0.7", "linewidth": 0.8},
    "window": {"color": "tab:blue", "linewidth": 1.5},
    "ema": {"color": "tab:red", "linewidth": 1.5},
}


def read_statistics(run: str) -> dict[str, dict[str, dict[str, list[tuple[float, float]]]]]:
    """Return {layer: {statistic: {kind: [(iteration, value), ...]}}} of a run's metrics.json."""
    layers: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {}
    for record in read_metrics(run):
        for key, value in record.items():
            if key.startswith("statistics/"):
                _, layer, statistic, kind = key.split("/")
                series = layers.setdefault(layer, {}).setdefault(statistic, {})
                series.setdefault(kind, []).append((record["iteration"] + 1, value))
    return layers


def plot(columns: Sequence[tuple[str, Mapping]], output: str) -> None:
    """Draw [(title, {statistic: {kind: series}}), ...] into the picture `output`."""
    rows = max(len(statistics) for _, statistics in columns)
    size = (5 * len(columns), 2 * rows)
    figure, axes = new_figure(rows, len(columns), size, squeeze=False, sharex=True)
    for column, (title, statistics) in zip(axes.T, columns, strict=True):
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
    save_figure(figure, output)


def short_names(runs: Sequence[str]) -> list[str]:
    """Return the ends of the runs' paths, as long as it takes to tell the runs apart."""
    paths = [Path(run).resolve().parts for run in runs]
    different = len(set(paths))
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == different:
            break
    return names


def plot_statistics(runs: Sequence[str], layer: str | None, output: str) -> None:
    """Draw the statistics of one layer, a column for each run.

    Args:
        runs: output folders of trainings with MODEL.MABN.LOG_PERIOD.
        layer: name of a norm layer; None takes the middle one of those that were logged.
        output: the picture.

    Raises:
        ConfigError: if a run has no statistics of the layer, or `output` has a suffix of no picture.
        CheckpointError: if `output` can't be written.
    """
    if Path(output).suffix.lstrip(".") not in picture_formats():
        raise ConfigError(f"--output is {output!r}: end it in .png, .pdf or .svg")
    columns = []
    for run, short in zip(runs, short_names(runs), strict=True):
        try:
            layers = read_statistics(run)
        except OSError as error:
            raise ConfigError(f"{run} is not the output folder of a training: {error}") from error
        names = sorted(sorted(layers), key=forward_order)
        if not names:
            raise ConfigError(f"{run} has no statistics: train with MODEL.MABN.LOG_PERIOD")
        name = layer or names[len(names) // 2]
        if name not in layers:
            raise ConfigError(f"{run} has no statistics of {name}: use one of {', '.join(names)}")
        columns.append((f"{short}\n{name}", layers[name]))
    plot(columns, output)
