"""Table and picture of a sweep: test error against the normalization batch."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.ticker import ScalarFormatter
from tabulate import tabulate

from ..visualization import new_figure, save_figure
from .models import WITHOUT_NORM_BATCH, norm_names

# Top-1 error, %, ImageNet, ResNet-50 (the paper's table).
PUBLISHED = {("bn", 32): 23.41, ("bn", 2): 35.22, ("brn", 2): 30.29, ("mabn", 2): 23.67}
Rows = Sequence[Mapping[str, str]]


def summary(rows: Rows) -> dict[str, dict[int, tuple[float, float, int]]]:
    """Return {norm: {normalization batch: (mean, sample standard deviation, seeds)}} of the errors.

    A norm without normalization batch, such as GroupNorm, has the key 0.
    """
    errors: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        size = 0 if row["norm"] in WITHOUT_NORM_BATCH else int(row["norm_batch"])
        errors.setdefault(row["norm"], {}).setdefault(size, []).append(float(row["top1_error"]))
    return {
        norm: {
            size: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0, len(v))
            for size, v in sorted(points.items())
        }
        for norm, points in errors.items()
    }


def table(rows: Rows) -> str:
    """Return the summary as Markdown."""
    found = summary(rows)
    sizes = sorted({size for points in found.values() for size in points if size})
    lines: list[list[str | None]] = []
    for norm, points in found.items():
        cells = {
            s: f"{mean:.1f}" + f" ± {std:.1f}" * (n > 1) for s, (mean, std, n) in points.items()
        }
        if norm in WITHOUT_NORM_BATCH:
            lines.append([WITHOUT_NORM_BATCH[norm], cells[0]])
        else:
            lines.append([norm.upper(), *(cells.get(size) for size in sizes)])
    return tabulate(lines, ["normalization batch", *sizes], "github", disable_numparse=True)


def draw(rows: Rows, path: Path, title: str) -> None:
    """Draw mean and sample standard deviation over the seeds against the normalization batch."""
    figure, axes = new_figure()
    colours = dict(zip(norm_names(), matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]))
    sizes = sorted({int(row["norm_batch"]) for row in rows})
    for norm, points in sorted(summary(rows).items()):
        if norm in WITHOUT_NORM_BATCH:
            points = dict.fromkeys(sizes, points[0])
        mean, std, seeds = zip(*points.values())
        x, label = list(points), f"{norm.upper()} ({min(seeds)} seeds)"
        axes.plot(
            x, mean, "--" if norm in WITHOUT_NORM_BATCH else "o-", color=colours[norm], label=label
        )
        low, high = ([m + sign * s for m, s in zip(mean, std)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colours[norm], alpha=0.2)
    for norm in sorted({norm for norm, _ in PUBLISHED}):
        stars = sorted((size, error) for (n, size), error in PUBLISHED.items() if n == norm)
        label = f"{norm.upper()}, published: ImageNet, ResNet-50"
        axes.plot(*zip(*stars), "*", color=colours[norm], markeredgecolor="k", ms=12, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlabel="normalization batch (images)", ylabel="top-1 error (%)", title=title)
    axes.set_ylim(0, None)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=130)
