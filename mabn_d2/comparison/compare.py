"""The comparison: trains all rows and seeds, writes tables and pictures."""

import csv
import json
from argparse import Namespace
from collections.abc import Collection
from pathlib import Path

from ..engine import ConfigError, launch
from ..engine.resume import check_output_folder
from .report import draw_predictions_of_rows, plot_curves, write_runs, write_table
from .rows import parse_row
from .runs import check_same_config, make_config, result_file, runs_there, train


def compare(args: Namespace) -> Path:
    """Train what is missing, write tables and pictures, return the path of the table.

    A finished run is not repeated, and an interrupted one goes on from its last checkpoint. The
    tables are written after each run. They and the pictures also show the finished runs of `output`
    that `args` does not name.

    Args:
        args: `config_file`; `rows` and `seeds`, of which each pair is a run; `num_gpus`, 0 for the
            CPU; `output`, a folder; `opts`, further KEY VALUE of the config.

    Raises:
        ConfigError: before anything is trained, if a row or config is wrong, or if `output` holds
            a run of another config or a table of runs that are not there.
    """
    if min(args.seeds) < 0:
        raise ConfigError(f"--seeds has {min(args.seeds)}: use 0 or more, which can be repeated")
    check_output_folder(str(args.output), resume=True, key="--output")
    # All rows of a seed before the next seed, so that an early look compares equal seeds.
    wanted = [(row, seed) for seed in args.seeds for row in args.rows]
    runs = dict.fromkeys([*wanted, *runs_there(args.output)])
    configs = {run: make_config(args, *run) for run in runs}
    for cfg in configs.values():
        check_same_config(cfg)
    finished = [run for run, cfg in configs.items() if result_file(cfg).exists()]
    _check_table(args.output / "runs.csv", finished)
    args.output.mkdir(parents=True, exist_ok=True)
    for run in wanted:
        if not result_file(configs[run]).exists():
            launch(train, parse_row(run[0]).processes, dist_url="auto", args=(args, *run))
        finished = [run for run, cfg in configs.items() if result_file(cfg).exists()]
        results = {run: json.loads(result_file(configs[run]).read_text()) for run in finished}
        write_runs(results, args.output / "runs.csv")
        write_table(results, args.output / "table.md")
    folders: dict[str, list[str]] = {}
    for run in finished:
        folders.setdefault(run[0], []).append(configs[run].OUTPUT_DIR)
    plot_curves(folders, args.output / "curves.png")
    first = {row: paths[0] for row, paths in folders.items()}
    draw_predictions_of_rows(first, args.output / "predictions.png")
    return args.output / "table.md"


def _check_table(path: Path, finished: Collection[tuple[str, int]]) -> None:
    """Raise ConfigError if a runs.csv has a line that the finished runs would not give again."""
    if not path.exists():
        return
    known = {(row, str(seed)) for row, seed in finished}
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            row, seed = line.get("row"), line.get("seed")
            if (row, seed) not in known:
                raise ConfigError(
                    f"{path} lists {row} with seed {seed}, but {path.parent}/runs has no such run, so "
                    "its line would be lost: remove the file, or name another --output"
                )
