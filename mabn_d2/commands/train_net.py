"""Trains and evaluates Detectron2 models with MABN; the flags are Detectron2's own."""

import argparse
from collections.abc import Sequence

from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..checkpoint import SafeCheckpointer, record_of_config, warn_of_differences
from ..checkpoint.description import warn_of_other_classes
from ..config_files import find_config_file
from ..engine import Trainer, check_data, launch, one_line_errors, setup_config
from ..engine.data_check import check_datasets
from ..engine.log import share_log
from ..engine.own_data import log_folder, warn_if_trained_on
from ..engine.report import log_report


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = default_argument_parser()
    parser.add_argument("--data", metavar="FOLDER", help="own images: docs/custom-data.md")
    args = parser.parse_args(arguments)
    args.config_file = find_config_file(args.config_file)
    return args


@one_line_errors()
def run(args: argparse.Namespace) -> dict | None:
    """Train or evaluate in one process; return the results of the evaluation."""
    cfg = setup_config(args)
    check_data(cfg, train=not args.eval_only)  # before default_setup writes to OUTPUT_DIR
    if args.eval_only:
        logged = cfg.clone()
        logged.defrost()
        logged.OUTPUT_DIR += "/evaluation"  # config.yaml and log.txt of the training stay
        default_setup(logged, args)
        share_log()
        log_folder(cfg)
        model = Trainer.build_model(cfg)
        checkpointer = SafeCheckpointer(model, save_dir=cfg.OUTPUT_DIR, complete=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        record = checkpointer.record or record_of_config(checkpointer.loaded, train=False)
        warn_of_differences(record, cfg)
        warn_if_trained_on(cfg, checkpointer.loaded)
        results = Trainer.test(cfg, model)
        # Now: Detectron2 takes the names of the classes from a file when it loads it.
        warn_of_other_classes(checkpointer.loaded, cfg.DATASETS.TEST)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    default_setup(cfg, args)
    log_folder(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trained = trainer.train()
    log_report(trainer)
    return trained


def check(args: argparse.Namespace) -> None:
    """Check the config before any process starts, so that an error is said once."""
    check_datasets(setup_config(args, alone=True), train=not args.eval_only)


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the processes that train or evaluate."""
    args = parse_args(arguments)
    launch(run, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,), check)
