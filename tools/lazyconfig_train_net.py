#!/usr/bin/env python
"""Trains and evaluates a model of a LazyConfig, with MABN; the flags are Detectron2's own.

Beside Detectron2's keys, `train` may have those of the norms and of the hook that logs what they see:

    train.mabn = dict(batch_size=2, simulated_batch_size=32)  # of configure_mabn
    train.brn = dict(warmup_iters=5000)                       # of BatchRenorm2d.configure
    train.statistics = dict(period=20)                        # of LogStatistics
    train.accumulation_steps = 8                              # of GuardedTrainer

With `train.accumulation_steps` n the images of one iteration (`dataloader.train.total_batch_size`)
are divided into n micro-batches on each process. The schedules in `train.mabn` and `train.brn` stay in
optimizer iterations; `batch_size` there is that of a micro-batch.
"""

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from mabn_d2 import fuse_relu
from mabn_d2.checkpoint import SafeCheckpointer
from mabn_d2.data.workers import guard_workers
from mabn_d2.engine import ConfigError, launch, one_line_errors
from mabn_d2.engine.data_check import check_lazy_data
from mabn_d2.engine.guarded_trainer import GuardedDDP, GuardedTrainer
from mabn_d2.engine.hooks import StopOnSignal
from mabn_d2.engine.hooks.log_statistics import LogStatistics
from mabn_d2.modeling.norm import check_paired
from mabn_d2.modeling.norm_table import configure_norms_by_name, scale_norm_schedules


def build_model(cfg):
    """Return the model on train.device, its norms set by train.mabn and train.brn, ReLU fused."""
    model = instantiate(cfg.model).to(cfg.train.device)
    check_paired(model)
    configure_norms_by_name(model, cfg.train)
    scale_norm_schedules(model, accumulation_steps(cfg))
    return fuse_relu(model)


def accumulation_steps(cfg):
    """Return train.accumulation_steps, micro-batches in one iteration; 1 if it is not set.

    Raises:
        ConfigError: if it is no positive whole number, or does not divide the images of a process.
    """
    steps = cfg.train.get("accumulation_steps", 1)
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(
            f"train.accumulation_steps is {steps!r}: use 1 for no accumulation, or the number of "
            "micro-batches in one iteration"
        )
    images = cfg.dataloader.train.get("total_batch_size")
    micro_batches = steps * comm.get_world_size()
    if steps > 1 and images is not None and (images < micro_batches or images % micro_batches):
        raise ConfigError(
            f"dataloader.train.total_batch_size is {images}, no multiple of {steps} "
            f"(train.accumulation_steps) times {comm.get_world_size()} (processes): change one"
        )
    return steps


def evaluate(cfg, model):
    if "evaluator" not in cfg.dataloader:
        return {}
    loader = guard_workers(instantiate(cfg.dataloader.test))
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    print_csv_format(results)
    return results


def distribute(model, device, fp16_compression=False, **settings):
    """`detectron2.engine.create_ddp_model` with GuardedDDP, on the CPU too."""
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise ConfigError(
            'the model has "SyncBN", which needs GPUs where several processes train: use "naiveSyncBN"'
        )
    model = GuardedDDP(model, device_ids=None if on_cpu else [comm.get_local_rank()], **settings)
    if fp16_compression:
        model.register_comm_hook(state=None, hook=fp16_compress_hook)
    return model


def train(cfg, model, resume):
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    bare = model
    if comm.get_world_size() > 1:
        model = distribute(model, cfg.train.device, **cfg.train.ddp)
    loader = guard_workers(instantiate(cfg.dataloader.train))
    trainer = GuardedTrainer(
        model,
        loader,
        optimizer,
        amp=cfg.train.amp.enabled,
        accumulation_steps=accumulation_steps(cfg),
    )
    checkpointer = SafeCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    main = comm.is_main_process()
    scheduler = instantiate(cfg.lr_multiplier)
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter) if main else []
    watched = [cfg.train.statistics] if "statistics" in cfg.train else []
    trainer.register_hooks(
        [
            *[
                LogStatistics(bare, grad_scaler=trainer.grad_scaler, **settings)
                for settings in watched
            ],
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=scheduler),
            *([hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)] if main else []),
            hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model)),
            *([hooks.PeriodicWriter(writers, period=cfg.train.log_period)] if main else []),
            StopOnSignal(checkpointer),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)


@one_line_errors()
def main(args):
    cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    if args.num_gpus == 0 or not torch.cuda.is_available():
        cfg.train.device = "cpu"
    check_lazy_data(cfg, train=not args.eval_only)  # before default_setup writes to output_dir
    default_setup(cfg, args)
    model = build_model(cfg)
    if not args.eval_only:
        return train(cfg, model, args.resume)
    SafeCheckpointer(model, cfg.train.output_dir).resume_or_load(
        cfg.train.init_checkpoint, resume=args.resume
    )
    return evaluate(cfg, model)


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,))
