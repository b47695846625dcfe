"""The comparison: trains all rows and seeds, writes tables and pictures."""

import json
from argparse import Namespace
from pathlib import Path

from ..engine import ConfigError, launch
from ..engine.resume import check_output_folder
from .report import draw_predictions_of_rows, plot_curves, write_runs, write_table
from .rows import parse_row
from .runs import check_same_config, make_config, result_file, train


def compare(args: Namespace) -> Path:
    """Train what is missing, write tables and pictures, return the path of the table.

    A finished run is not repeated, and an interrupted one goes on from its last checkpoint. The
    tables are written after each run.

    Args:
        args: `config_file`; `rows` and `seeds`, of which each pair is a run; `num_gpus`, 0 for the
            CPU; `output`, a folder; `opts`, further KEY VALUE of the config.

    Raises:
        ConfigError: before anything is trained, if a row or config is wrong, or if `output` holds
            a run of another config.
    """
    if min(args.seeds) < 0:
        raise ConfigError(f"--seeds has {min(args.seeds)}: use 0 or more, which can be repeated")
    check_output_folder(str(args.output), resume=True, key="--output")
    # All rows of a seed before the next seed, so that an early look compares equal seeds.
    runs = [(row, seed) for seed in args.seeds for row in args.rows]
    configs = {run: make_config(args, *run) for run in runs}
    for cfg in configs.values():
        check_same_config(cfg)
    args.output.mkdir(parents=True, exist_ok=True)
    results = {}
    for run, cfg in configs.items():
        if not result_file(cfg).exists():
            launch(train, parse_row(run[0]).processes, dist_url="auto", args=(args, *run))
        results[run] = json.loads(result_file(cfg).read_text())
        write_runs(results, args.output / "runs.csv")
        write_table(results, args.output / "table.md")
    folders = {row: [configs[row, seed].OUTPUT_DIR for seed in args.seeds] for row in args.rows}
    plot_curves(folders, args.output / "curves.png")
    first = {row: configs[row, args.seeds[0]] for row in args.rows}
    draw_predictions_of_rows(first, args.output / "predictions.png")
    return args.output / "table.md"
