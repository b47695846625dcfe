"""Draws batch statistics against their windows (SMAS) and EMA (EMAS), one column for each run.

    tools/plot_statistics.py output/bn output/mabn --output statistics.png

The runs are output folders of trainings with MODEL.MABN.LOG_PERIOD. The paper argues (section 3) that
with small batches the statistics of the backward, g and psi, are as noisy as those of the forward, and
that an average over a window, unlike the EMA, follows the weights closely enough to be used.
"""

import argparse
from collections.abc import Sequence

from ..command_names import name_commands
from ..engine import one_line_errors
from ..engine.statistics_plot import plot_statistics


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=name_commands(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a training")
    parser.add_argument("--layer", help="name of a norm layer; default: the middle one logged")
    parser.add_argument("--output", default="statistics.png", help="default: statistics.png")
    return parser.parse_args(arguments)


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, and print the path of the picture."""
    args = parse_args(arguments)
    plot_statistics(args.runs, args.layer, args.output)
    print(args.output)
