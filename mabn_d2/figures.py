"""Figures that are drawn into files: matplotlib's backend, which a notebook has chosen, stays as it is."""

from os import PathLike
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .checkpoint.io import atomic_file


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4.5), **settings: Any
) -> tuple[Figure, Any]:
    """Return a figure and its axes, as `matplotlib.pyplot.subplots`, without pyplot.

    Args:
        rows, columns: of the grid of axes.
        size: width and height in inches.
        settings: of `Figure.subplots`.
    """
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **settings)


def picture_formats() -> list[str]:
    """Return the suffixes that `save_figure` knows, without a dot."""
    return sorted(Figure().canvas.get_supported_filetypes())


def save_figure(figure: Figure, path: str | PathLike, dpi: int = 100) -> None:
    """Write a figure whole, its format by suffix.

    Raises:
        CheckpointError: if the file can't be written.
        ValueError: for a suffix that is none of `picture_formats`.
    """
    path = Path(path)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=dpi, format=path.suffix.lstrip("."))
