"""Trains and evaluates a model of a LazyConfig, with MABN; the flags are Detectron2's own.

A LazyConfig file is a program, which runs when it is loaded: use only files that you trust.

Beside Detectron2's keys, `train` may have those of the norms and of the hook that logs what they see:

    train.mabn = dict(batch_size=2, simulated_batch_size=32)  # of configure_mabn
    train.brn = dict(warmup_iters=5000)                       # of BatchRenorm2d.configure
    train.statistics = dict(period=20)                        # of LogStatistics
    train.accumulation_steps = 8                              # of GuardedTrainer
    train.convert_weights = True                              # BatchNorm in init_checkpoint -> MABN
    train.bad_input = "skip"                                  # as DATALOADER.BAD_INPUT
    train.seed = 0                                            # a resumed run equals a straight one (CPU)

and those of what follows from an evaluation, every `train.eval_period` iterations:

    train.validation_loss = True                              # losses on the test images
    train.best_metric = "auto"                                # model_best.pth; or "bbox/AP50", ...
    train.early_stopping_patience = 5                         # evaluations without a better value
    train.pictures = 4                                        # predictions in TensorBoard

With `train.accumulation_steps` n the images of one iteration (`dataloader.train.total_batch_size`)
are divided into n micro-batches on each process. The schedules in `train.mabn` and `train.brn` stay in
optimizer iterations; `batch_size` there is that of a micro-batch.
"""

from collections.abc import Sequence

from detectron2.engine import default_argument_parser

from ..command_names import name_commands
from ..config_files import find_config_file
from ..engine import launch
from ..engine.lazy_trainer import check, run


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the processes that train or evaluate."""
    args = default_argument_parser(epilog=name_commands(__doc__ or "")).parse_args(arguments)
    args.config_file = find_config_file(args.config_file)
    launch(run, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,), check)
