"""Trains norms x normalization batch sizes x seeds and draws test error against batch size.

Without --data: a small network on the digit crops, a minute a run on one CPU core. With --data DIR:
arguments after "--" go to train_imagenet.py, as in: sweep_batch_size.py --data DIR -- --amp.
Runs that sweep.csv lists are not repeated; an interrupted run goes on from its checkpoint.
Writes to --output: sweep.csv (a line for each run), sweep.png, table.md (mean and sample standard
deviation).
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from ..classification.models import norm_names
from ..classification.sweep import run_sweep
from ..engine import one_line_errors


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", metavar="DIR", help="image folder; default: the digit crops, made if missing")
    add(
        "--output",
        metavar="DIR",
        help="default: results/batch_size, with --data results/batch_size_<name of its folder>",
    )
    add("--runs", metavar="DIR", help="checkpoints and logs of the runs; default: OUTPUT/runs")
    add("--norms", nargs="+", default=["bn", "brn", "mabn", "gn"], choices=norm_names())
    add("--sizes", nargs="+", type=int, default=[2, 32, 8, 4], help="normalization batches")
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--jobs", type=int, help="runs at a time; default: one for each core, with --data one")
    add("--draw-only", action="store_true")
    add("rest", nargs="*", help="further arguments of train_imagenet.py, after --")
    args = parser.parse_args(arguments)
    own = "" if args.data is None else f"_{Path(args.data).resolve().name}"
    args.output = Path(args.output or f"results/batch_size{own}")
    args.runs = Path(args.runs or args.output / "runs")
    return args


@one_line_errors(BrokenProcessPool, ImportError, OSError, ValueError)
def main(arguments: Sequence[str] | None = None) -> None:
    """Train and draw; a failed run is one line and exit status 1."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        failed = run_sweep(parse_args(arguments))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if failed:
        sys.exit(
            f"{Path(sys.argv[0]).name}: {len(failed)} runs failed, start again to repeat them: "
            + "; ".join(failed)
        )
