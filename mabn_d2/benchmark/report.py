"""Tables and pictures of a benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from tabulate import tabulate

from ..visualization import new_figure, save_figure

HEADERS = "threads dtype format shape norm ms quartiles ratio quartiles peak-MiB 1/s".split()


def table(results: Sequence[dict]) -> str:
    """Return the rows of a report as text."""
    shares = any("of_copy" in r for r in results)
    rows = []
    for r in results:
        (a, ms, b), (c, ratio, d) = r["ms"], r["ratio"]
        shape = "x".join(map(str, r["shape"])) + (f" x{r['depth']}" if r["depth"] > 1 else "")
        row = [r["threads"], r["dtype"], r["format"], shape, r["norm"], f"{ms:.2f}"]
        row += [f"{a:.2f}-{b:.2f}", f"{ratio:.2f}", f"{c:.2f}-{d:.2f}"]
        row += [f"{r['peak_bytes'] / 2**20:.1f}", f"{1000 / ms:.2f}"]
        rows.append(row + ([f"{r.get('of_copy', 1):.2f}"] if shares else []))
    headers = [*HEADERS, *(["of copy"] if shares else [])]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def plot(report: dict, path: Path) -> None:
    """Draw time against size, and the ratios to the baseline, of all rows of a report."""
    figure, (left, right) = new_figure(1, 2, size=(11, 4.2))
    rows, norms = report["results"], report["settings"]["norms"]
    _plot_times(left, rows, norms)
    _plot_ratios(right, rows, norms)
    save_figure(figure, path, dpi=80)


def _plot_times(axis: "Axes", rows: list[dict[str, Any]], norms: Sequence[str]) -> None:
    """One colour for each norm, one line for each dtype, format, thread count and depth."""

    def line_of(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["dtype"], row["format"], row["threads"], row["depth"]

    for k, norm in enumerate(norms):
        for i, line in enumerate(dict.fromkeys(map(line_of, rows))):
            of_line = [r for r in rows if r["norm"] == norm and line_of(r) == line]
            of_line.sort(key=lambda r: r["elements"])
            x, y = [r["elements"] for r in of_line], [r["ms"][1] for r in of_line]
            axis.plot(x, y, "o-", color=f"C{k}", label=None if i else norm, linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="elements (N C H W, depth)", ylabel="ms")
    axis.legend()


def _plot_ratios(axis: "Axes", rows: list[dict[str, Any]], norms: Sequence[str]) -> None:
    """A bar for each norm, dtype, format and thread count."""

    def case_of(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["dtype"], row["format"], row["threads"]

    cases = list(dict.fromkeys(map(case_of, rows)))
    width = 0.8 / len(norms)
    for k, norm in enumerate(norms):
        heights = []
        for case in cases:
            ratios = [r["ratio"][1] for r in rows if r["norm"] == norm and case_of(r) == case]
            heights.append(torch.tensor(ratios).log().mean().exp().item())
        places = [i + k * width for i in range(len(cases))]
        axis.bar(places, heights, width, color=f"C{k}", label=norm)
    labels = [f"{dtype} {layout}\n{threads} threads" for dtype, layout, threads in cases]
    axis.set_xticks([i + 0.4 - width / 2 for i in range(len(cases))], labels, fontsize=7)
    axis.axhline(1, color="gray", linewidth=0.7)
    axis.set(ylabel="time / baseline, geometric mean over sizes")
