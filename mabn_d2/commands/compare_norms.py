"""Trains one detector under several norms and compares them: the paper's table on a small scale.

    tools/compare_norms.py                                    # all rows; goes on where it stopped
    tools/compare_norms.py --rows MABN:2 BN:2 --seeds 0 --output output/quick --set SOLVER.MAX_ITER 500

A row is NORM:IMAGES, the images in one iteration. NORM:IMAGES/MICRO divides them into micro-batches of
MICRO images and accumulates their gradients: MABN:8/2 takes one step for 8 images, 2 at a time. With
xPROCESSES at the end, IMAGES is the images on each of several processes: BN:2x4 and naiveSyncBN:2x4
see the same 8 images, in normalization batches of 2 and of 8. All rows have the iterations and the
learning rate of the config, so a row with more images sees more of them. A finished run is not
repeated; an interrupted run goes on from its last checkpoint. A folder with runs of another config,
of any row, is refused.

Writes to --output: runs.csv (a line for each run), table.md (mean and standard deviation over the
seeds), curves.png, predictions.png (of the first seed). The runs themselves are in runs/. Tables and
pictures show all finished runs of runs/, also those of an earlier call with other rows or seeds.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..command_names import name_commands
from ..comparison import compare
from ..comparison.rows import DEFAULT_ROWS
from ..config_files import find_config_file, get_config_file
from ..engine import one_line_errors

CONFIG = "digits/compare_mask_rcnn_R10_FPN.yaml"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=name_commands(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file", type=find_config_file, default=get_config_file(CONFIG), help="of all rows"
    )
    parser.add_argument("--rows", nargs="+", default=DEFAULT_ROWS, metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--num-gpus", type=int, default=1, help="0: CPU even if there is a GPU")
    parser.add_argument("--output", type=Path, default=Path("output/comparison"), help="a folder")
    parser.add_argument("--set", dest="opts", nargs="+", default=[], metavar="KEY VALUE")
    return parser.parse_args(arguments)


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, and print the table."""
    print(compare(parse_args(arguments)).read_text())
