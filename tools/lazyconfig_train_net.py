#!/usr/bin/env python
"""Trains and evaluates a model of a LazyConfig, with MABN; the flags are Detectron2's own."""

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

from mabn_d2 import configure_mabn
from mabn_d2.checkpoint import SafeCheckpointer
from mabn_d2.engine import launch
from mabn_d2.engine.hooks import StopOnSignal
from mabn_d2.engine.step import GuardedDDP, GuardedTrainer


def build_model(cfg):
    """Return the model on train.device, its MABN layers set by train.mabn."""
    model = instantiate(cfg.model).to(cfg.train.device)
    return configure_mabn(model, **cfg.train.get("mabn", {}))


def evaluate(cfg, model):
    if "evaluator" not in cfg.dataloader:
        return {}
    loader = instantiate(cfg.dataloader.test)
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    print_csv_format(results)
    return results


def train(cfg, model, resume):
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    if comm.get_world_size() > 1:
        on_cpu = torch.device(cfg.train.device).type == "cpu"
        devices = None if on_cpu else [comm.get_local_rank()]
        buffers = cfg.train.ddp.broadcast_buffers
        model = GuardedDDP(model, device_ids=devices, broadcast_buffers=buffers)
    trainer = GuardedTrainer(model, loader, optimizer, amp=cfg.train.amp.enabled)
    checkpointer = SafeCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    main = comm.is_main_process()
    scheduler = instantiate(cfg.lr_multiplier)
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter) if main else []
    trainer.register_hooks([
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=scheduler),
        *([hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)] if main else []),
        hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model)),
        *([hooks.PeriodicWriter(writers, period=cfg.train.log_period)] if main else []),
        StopOnSignal(checkpointer),
    ])
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)


def main(args):
    cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    if args.num_gpus == 0 or not torch.cuda.is_available():
        cfg.train.device = "cpu"
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
