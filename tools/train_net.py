#!/usr/bin/env python
"""Trains and evaluates Detectron2 models with MABN; the flags are Detectron2's own."""

from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from mabn_d2 import SafeCheckpointer, warn_of_differences
from mabn_d2.engine import Trainer, check_data, launch, one_line_errors, setup_config
from mabn_d2.engine.own_data import log_folder


@one_line_errors()
def main(args):
    cfg = setup_config(args)
    if args.eval_only:
        logged = cfg.clone()
        logged.defrost()
        logged.OUTPUT_DIR += "/evaluation"  # config.yaml and log.txt of the training stay
        default_setup(logged, args)
        log_folder(cfg)
        model = Trainer.build_model(cfg)
        checkpointer = SafeCheckpointer(model, save_dir=cfg.OUTPUT_DIR, complete=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        warn_of_differences(checkpointer.record, cfg)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    default_setup(cfg, args)
    log_folder(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def check(args):
    """Check everything before any process starts, so that an error is said once."""
    check_data(setup_config(args, alone=True), train=not args.eval_only)


if __name__ == "__main__":
    parser = default_argument_parser()
    parser.add_argument("--data", metavar="FOLDER", help="own images: docs/custom-data.md")
    args = parser.parse_args()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,), check)
