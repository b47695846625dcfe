"""Training and evaluation of a model of a LazyConfig, with MABN."""

import contextlib
import copy
import os
from argparse import Namespace
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase, default_setup, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter
from omegaconf import DictConfig
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from ..checkpoint import SafeCheckpointer, record_of_config
from ..checkpoint.description import describe_classes, warn_of_other_classes
from ..data.batches import MicroBatches
from ..data.requirements import DataRequirements
from ..data.workers import guard_workers
from ..modeling.norm import check_paired
from ..modeling.norm_table import configure_norms_by_name, scale_norm_schedules
from ..solver import UntilTheEnd
from ..surgery.fuse_relu import fuse_relu
from .data_check import check_lazy_data
from .errors import ConfigError, one_line_errors
from .guarded_trainer import GuardedDDP, GuardedTrainer
from .hooks import (
    BestCheckpoint,
    DrawPredictions,
    EarlyStopping,
    KeepNewest,
    KeepRankStates,
    LogSlowIterations,
    LogStatistics,
    StopOnSignal,
    TrainingStopped,
    WriteEvaluations,
)
from .hooks.rank_states import restore_rank_states
from .hooks.recalibrate import recalibrate_converted
from .lazy_config import (
    accumulation_steps,
    best_metric,
    check_lazy_config,
    load_lazy_config,
    log_or_refuse_changes,
    warn_of_recorded,
)
from .lazy_data import build_train_loader, build_validation_loader, pictures
from .log import share_log
from .numpy_2 import evaluators_on_numpy_2
from .resume import log_changes, warn_if_finished, warn_if_random_and_frozen
from .validation_loss import validation_losses


def build_model(cfg: DictConfig) -> nn.Module:
    """Return the model on train.device, its norms set by train.mabn and train.brn, ReLU fused."""
    model = instantiate(cfg.model).to(cfg.train.device)
    check_paired(model)
    configure_norms_by_name(model, cfg.train)
    scale_norm_schedules(model, accumulation_steps(cfg))
    return fuse_relu(model)


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """Return the results of dataloader.evaluator on dataloader.test; none without an evaluator."""
    if "evaluator" not in cfg.dataloader:
        return {}
    loader = guard_workers(instantiate(cfg.dataloader.test))
    with evaluators_on_numpy_2():
        results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    print_csv_format(results)
    return results


def distribute(
    model: nn.Module, device: str, fp16_compression: bool = False, **settings: Any
) -> GuardedDDP:
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


def train(cfg: DictConfig, model: nn.Module, resume: bool) -> None:
    """Train a built model, from train.init_checkpoint or from the last checkpoint."""
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    bare = model
    if comm.get_world_size() > 1:
        model = distribute(model, cfg.train.device, **cfg.train.get("ddp", {}))
    steps, seed = accumulation_steps(cfg), cfg.train.get("seed", -1)
    trainer = GuardedTrainer(
        model,
        [],  # the loader is built when the first iteration is known
        optimizer,
        amp=cfg.train.amp.enabled,
        accumulation_steps=steps,
        seed=seed if seed >= 0 else None,
    )
    checkpointer = SafeCheckpointer(
        model,
        cfg.train.output_dir,
        convert_batch_norm=cfg.train.get("convert_weights", False),
        trainer=trainer,
    )
    # Not the config: a LazyConfig is a program.
    names = DataRequirements.from_lazy(cfg, True).train.value
    checkpointer.description = describe_classes(names)
    trainer.register_hooks(_build_hooks(cfg, bare, trainer, checkpointer))
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    warn_of_recorded(checkpointer.record or record_of_config(checkpointer.loaded), cfg)
    warn_of_other_classes(checkpointer.loaded, names[:1])
    start = 0
    if resume and checkpointer.has_checkpoint():
        start = trainer.iter + 1
        warn_if_finished(start, cfg.train.max_iter, "train.max_iter")
        restore_rank_states(bare, checkpointer.loaded)
    else:
        weights = cfg.train.init_checkpoint
        warn_if_random_and_frozen(
            bare, weights, "train.init_checkpoint", "freeze_at=0 in the model"
        )
    checkpointer.loaded = {}
    if checkpointer.needs_recalibration:
        recalibrate_converted(model, MicroBatches(build_train_loader(cfg, steps), steps))
    trainer.data_loader = build_train_loader(cfg, steps, start)
    with contextlib.suppress(TrainingStopped):  # by early stopping, as planned
        trainer.train(start, cfg.train.max_iter)


def _build_hooks(
    cfg: DictConfig, bare: nn.Module, trainer: GuardedTrainer, checkpointer: SafeCheckpointer
) -> list[HookBase]:
    main = comm.is_main_process()
    rank_states = KeepRankStates(bare, checkpointer, cfg.train.checkpointer.period)
    chosen = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=UntilTheEnd(instantiate(cfg.lr_multiplier))),
        rank_states,
        *_evaluation_hooks(cfg, bare, trainer, checkpointer, rank_states),
        StopOnSignal(checkpointer, rank_states),
    ]
    if "statistics" in cfg.train:
        settings = cfg.train.statistics
        chosen.insert(0, LogStatistics(bare, grad_scaler=trainer.grad_scaler, **settings))
    if main:
        evaluation = next(i for i, h in enumerate(chosen) if isinstance(h, hooks.EvalHook))
        # The checkpoint before the evaluation, which may fail.
        checkpoints = KeepNewest(checkpointer, **cfg.train.checkpointer)
        chosen.insert(evaluation, checkpoints)
    return chosen


def _evaluation_hooks(
    cfg: DictConfig,
    bare: nn.Module,
    trainer: GuardedTrainer,
    checkpointer: SafeCheckpointer,
    rank_states: KeepRankStates,
) -> list[HookBase]:
    """Return the hooks of evaluation and of what follows from it; each uses those before it."""
    settings, period, metric = cfg.train, cfg.train.eval_period, best_metric(cfg)
    best = BestCheckpoint(period, checkpointer, metric, "train.best_metric") if metric else None
    chosen = [hooks.EvalHook(period, lambda: _evaluate(cfg, trainer.model, bare)), best]
    if comm.is_main_process():
        if settings.get("pictures", 0) > 0:
            chosen.append(DrawPredictions(pictures(cfg, bare), period))
        writers = default_writers(settings.output_dir, settings.max_iter)
        chosen.append(WriteEvaluations(period, writers))
        chosen.append(hooks.PeriodicWriter(writers, period=settings.log_period))
        printer = CommonMetricPrinter(settings.max_iter)
        chosen.append(LogSlowIterations(printer, settings.log_period))
    patience = settings.get("early_stopping_patience", 0)
    if best is not None and patience > 0:
        key = "train.early_stopping_patience"
        chosen.append(EarlyStopping(best, patience, rank_states, key))
    return [hook for hook in chosen if hook is not None]


def _evaluate(cfg: DictConfig, model: nn.Module, bare: nn.Module) -> dict[str, Any]:
    """Return the results of an evaluation while a model trains, its validation losses among them."""
    results = evaluate(cfg, model)
    if cfg.train.get("validation_loss", False):
        loader = build_validation_loader(cfg)
        losses = validation_losses(bare, loader) if loader is not None else {}
        if losses and comm.is_main_process():  # where the other results are
            results["validation"] = losses
    return results


def check(args: Namespace) -> None:
    """Check the config before any process starts, so that an error is said once."""
    check_lazy_config(load_lazy_config(args), args)


@one_line_errors()
def run(args: Namespace) -> dict[str, Any] | None:
    """Train or evaluate in one process; return the results of an evaluation."""
    cfg = load_lazy_config(args)
    check_lazy_data(cfg, train=not args.eval_only)  # before default_setup writes to output_dir
    changes = log_or_refuse_changes(cfg) if args.resume and not args.eval_only else []
    comm.synchronize()  # all have read config.yaml before it is written
    logged = copy.deepcopy(cfg)
    if args.eval_only:  # config.yaml and log.txt of the training stay
        logged.train.output_dir = os.path.join(cfg.train.output_dir, "evaluation")
    default_setup(logged, args)
    share_log()
    if comm.is_main_process():
        log_changes(changes, "the last checkpoint's")
    model = build_model(cfg)
    if not args.eval_only:
        train(cfg, model, args.resume)
        return None
    checkpointer = SafeCheckpointer(model, cfg.train.output_dir, complete=True)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    warn_of_recorded(checkpointer.record or record_of_config(checkpointer.loaded), cfg)
    return evaluate(cfg, model)
