"""The trainer that tools/train_net.py runs."""

import logging
import os
import weakref
from collections.abc import Mapping
from inspect import getattr_static
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.utils.data import DataLoader

from ..checkpoint import SafeCheckpointer, record_of_config, warn_of_differences
from ..checkpoint.description import CONFIG, describe, warn_of_other_classes
from ..data.batches import MicroBatches, TrainingBatches
from ..data.loader import build_test_loader, build_train_loader
from ..modeling.norm_table import norm_settings
from ..solver import build_lr_scheduler, build_optimizer
from ..surgery.recalibrate import layers_to_recalibrate
from ..visualization import prediction_pictures
from .config_check import check_keys, check_settings
from .data_check import check_data
from .errors import on_one_rank
from .evaluators import build_evaluator
from .guarded_trainer import GuardedDDP, GuardedTrainer
from .hooks import (
    BestCheckpoint,
    DrawPredictions,
    EarlyStopping,
    KeepNewest,
    KeepRankStates,
    LogSlowIterations,
    LogStatistics,
    RecalibrateMABN,
    StopOnSignal,
    SyncStatistics,
    TrainingStopped,
    WriteEvaluations,
)
from .hooks.best_checkpoint import best_metric
from .hooks.rank_states import restore_rank_states
from .hooks.recalibrate import recalibrate_converted
from .log import share_log
from .model_check import build_errors
from .numpy_2 import evaluators_on_numpy_2
from .own_data import with_folder
from .resume import (
    check_output_folder,
    check_same_run,
    follow_schedule,
    log_changes,
    warn_if_finished,
    warn_if_random,
    warn_if_random_and_frozen,
)
from .schedule import finalize_schedule, log_schedule, scale_to_processes
from .validation_loss import build_validation_loader, validation_losses

_logger = logging.getLogger(__name__)

# Keys whose values are known as long as a subclass does not override the method that reads them.
_READ_BY = {
    "SOLVER.LR_SCHEDULER_NAME": "build_lr_scheduler",
    "SOLVER.WARMUP_METHOD": "build_lr_scheduler",
    "SOLVER.OPTIMIZER": "build_optimizer",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "build_optimizer",
}


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer, for MABN.

    What differs: WEIGHT_DECAY_NORM reaches MABN; SOLVER.AMP and several processes work on CPU too;
    bad batches are skipped (`GuardedTrainer`); datasets are checked first (`check_data`), and
    all types have their evaluators; and with SEED >= 0 a resumed run equals the straight one (exactly
    so on CPU).

    Each rank has MABN statistics of its own, as it has BatchNorm's in Detectron2: each evaluates its
    share of the images by its own, and rank 0's are saved. With MODEL.MABN.SYNC_BEFORE_EVAL the
    running variances are averaged over the ranks first.
    """

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)  # DefaultTrainer's own lets no process train on CPU but one
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        share_log()
        check_keys(cfg)
        cfg = with_folder(cfg)
        check_data(cfg, evaluators=not self._overrides("build_evaluator"))
        cfg = cfg.clone()
        finalize_schedule(cfg)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        own = [key for key, method in _READ_BY.items() if self._overrides(method)]
        check_settings(cfg, comm.get_world_size(), own=own)
        log_schedule(cfg)
        with build_errors(cfg.MODEL):
            model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        if comm.get_world_size() > 1:
            on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
            devices = None if on_cpu else [comm.get_local_rank()]
            model = GuardedDDP(model, device_ids=devices, broadcast_buffers=False)
        self._trainer = GuardedTrainer(
            model,
            loader,
            optimizer,
            amp=cfg.SOLVER.AMP.ENABLED,
            accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
            seed=cfg.SEED if cfg.SEED >= 0 else None,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        # A proxy, because the checkpointer would otherwise keep the trainer alive, and it the model.
        self.checkpointer = SafeCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            convert_batch_norm=cfg.MODEL.MABN.CONVERT_WEIGHTS,
            trainer=weakref.proxy(self),
        )
        self.checkpointer.description = describe(cfg)
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self._output_is_ours = False
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """As DefaultTrainer's, but nothing of another run is overwritten or mixed with this one.

        Raises:
            ConfigError: if `resume` is False and OUTPUT_DIR holds the checkpoints of another run, or if
                it is True and that run had other settings that can't change.
        """
        if not (resume or self._output_is_ours):
            remedy = "call resume_or_load(resume=True) to go on with it"
            folder = self.cfg.OUTPUT_DIR
            on_one_rank(lambda: check_output_folder(folder, False, "OUTPUT_DIR", remedy))
        self._output_is_ours = True
        self.checkpointer.before_resume = self._check_same_run
        super().resume_or_load(resume)
        warn_of_other_classes(self.checkpointer.loaded, self.cfg.DATASETS.TRAIN[:1])
        if not (resume and self.checkpointer.has_checkpoint()):
            warn_if_random(self.cfg)
            warn_if_random_and_frozen(
                self._bare_model(),
                self.cfg.MODEL.WEIGHTS,
                "MODEL.WEIGHTS",
                "MODEL.BACKBONE.FREEZE_AT 0",
            )
        if self.start_iter > 0:
            log_changes(self._changes, self.start_iter)
            warn_if_finished(self.start_iter, self.max_iter)
            restore_rank_states(self._bare_model(), self.checkpointer.loaded)
            self.checkpointer.loaded = {}
        record = self.checkpointer.record or record_of_config(self.checkpointer.loaded)
        warn_of_differences(record, self.cfg)
        if self.checkpointer.needs_recalibration:
            recalibrate_converted(self.model, self._micro_batches())
        batches = getattr(self.data_loader, "batch_sampler", None)
        if isinstance(batches, TrainingBatches):
            batches.start = self.start_iter
        elif self.start_iter > 0:
            _logger.warning(
                "build_train_loader returns a loader of its own, which starts over with its shuffle: the "
                "resumed run does not equal an undisturbed one; for a mapper of your own return "
                "mabn_d2.data.loader.build_train_loader(cfg, mapper)"
            )

    def _check_same_run(self, checkpoint: dict[str, Any]) -> None:
        """Compare the config in a checkpoint, before anything of it is loaded, with this one."""
        text = checkpoint.get(CONFIG)
        self._changes = (
            check_same_run(self.cfg, text, "the config in the checkpoint")
            if isinstance(text, str)
            else []
        )

    def _overrides(self, method: str) -> bool:
        """Return whether a subclass has a method of its own."""
        return getattr_static(type(self), method) is not getattr_static(Trainer, method)

    def _bare_model(self) -> nn.Module:
        model: nn.Module = self.model
        return getattr(model, "module", model)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        before = state_dict["_trainer"]["optimizer"]["param_groups"]
        follow_schedule(self.scheduler, self.optimizer, before)

    def build_hooks(self) -> list[HookBase]:
        ours = []
        if self.cfg.MODEL.MABN.SYNC_BEFORE_EVAL:
            periods = (self.cfg.TEST.EVAL_PERIOD, self.cfg.SOLVER.CHECKPOINT_PERIOD)
            ours.append(SyncStatistics(self.model, periods))
        ours += self._precise_statistics()
        node = self.cfg.MODEL.MABN
        if node.LOG_PERIOD > 0:
            settings = norm_settings(self.cfg)
            ours.append(
                LogStatistics(
                    self._bare_model(),
                    node.LOG_PERIOD,
                    node.LOG_LAYERS,
                    window=settings["simulated_batch_size"] // settings["batch_size"],
                    momentum=node.MOMENTUM,
                    grad_scaler=self._trainer.grad_scaler,
                )
            )
        period = self.cfg.SOLVER.CHECKPOINT_PERIOD
        rank_states = KeepRankStates(self._bare_model(), self.checkpointer, period)
        ours += [hooks.IterationTimer(), hooks.LRScheduler(), rank_states]
        if comm.is_main_process():
            ours.append(
                KeepNewest(
                    self.checkpointer,
                    period,
                    max_to_keep=self.cfg.SOLVER.CHECKPOINTS_TO_KEEP or None,
                )
            )
        ours += self._evaluation_hooks(rank_states)
        return [*ours, StopOnSignal(self.checkpointer, rank_states)]

    def _evaluation_hooks(self, rank_states: KeepRankStates) -> list[HookBase]:
        """Return the hooks of evaluation and of what follows from it; each uses those before it."""
        test, period = self.cfg.TEST, self.cfg.TEST.EVAL_PERIOD
        chosen = [hooks.EvalHook(period, self._evaluate)]
        metric = best_metric(self.cfg)
        best = BestCheckpoint(period, self.checkpointer, metric) if metric else None
        if best is not None:
            chosen.append(best)
        if comm.is_main_process():
            if test.PICTURES > 0 and self.cfg.DATASETS.TEST:
                model = self._bare_model()
                chosen.append(
                    DrawPredictions(
                        lambda: prediction_pictures(self.cfg, model, test.PICTURES), period
                    )
                )
            writers = self.build_writers()
            chosen.append(WriteEvaluations(period, writers))
            chosen.append(hooks.PeriodicWriter(writers, period=20))
            chosen.append(LogSlowIterations(CommonMetricPrinter(self.max_iter)))
        patience = self.cfg.SOLVER.EARLY_STOPPING_PATIENCE
        if best is not None and patience > 0:
            chosen.append(EarlyStopping(best, patience, rank_states))
        return chosen

    def _precise_statistics(self) -> list[HookBase]:
        """Return the hooks of TEST.PRECISE_BN, on batches of the size that a forward has in training."""
        if not self.cfg.TEST.PRECISE_BN.ENABLED:
            return []
        period = self.cfg.TEST.EVAL_PERIOD
        # The images of NUM_ITER iterations.
        num_iters = self.cfg.TEST.PRECISE_BN.NUM_ITER * self.cfg.SOLVER.ACCUMULATION_STEPS
        chosen = []
        for hook, finds_layers in (
            (RecalibrateMABN, layers_to_recalibrate),
            (hooks.PreciseBN, get_bn_modules),
        ):
            if finds_layers(self.model):
                chosen.append(hook(period, self.model, self._micro_batches(), num_iters))
        if not chosen:
            _logger.warning(
                "TEST.PRECISE_BN.ENABLED is True, but the model has no MABN or BatchNorm that trains: "
                "nothing is recalibrated; set it False"
            )
        return chosen

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluate on DATASETS.TEST; with TEST.AUG.ENABLED, with test-time augmentation besides.

        Returns:
            The results of DefaultTrainer.test, and those with augmentation as {task}_TTA.
        """
        with evaluators_on_numpy_2():
            results = super().test(cfg, model, evaluators)
        if not cfg.TEST.AUG.ENABLED:
            return results
        _logger.info("Evaluating with test-time augmentation (TEST.AUG.ENABLED)")
        augmented_cfg = cfg.clone()
        augmented_cfg.defrost()
        augmented_cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "test_time_augmentation")
        was_training = model.training
        with evaluators_on_numpy_2():
            augmented = super().test(augmented_cfg, GeneralizedRCNNWithTTA(cfg, model))
        model.train(was_training)  # the wrapper is in training mode, and is set back to it
        several = len(cfg.DATASETS.TEST) > 1
        for name in cfg.DATASETS.TEST if several else [None]:
            into, found = (r[name] if several else r for r in (results, augmented))
            into |= {f"{task}_TTA": values for task, values in (found or {}).items()}
        return results

    def _evaluate(self) -> dict[str, Any]:
        results = self.test(self.cfg, self.model)
        if self.cfg.TEST.VALIDATION_LOSS:
            for name in self.cfg.DATASETS.TEST:
                loader = build_validation_loader(self.cfg, name)
                if loader is None:  # a set without annotations
                    continue
                losses = validation_losses(self._bare_model(), loader)
                if comm.is_main_process():  # where the other results are
                    several = len(self.cfg.DATASETS.TEST) > 1
                    (results[name] if several else results)["validation"] = losses
        self._last_eval_results = results
        return results

    def train(self) -> dict[str, Any] | None:
        """Train to the end, or to where early stopping ends it; see DefaultTrainer.train."""
        self._output_is_ours = True
        try:
            return super().train()
        except TrainingStopped:
            if not hasattr(self, "_last_eval_results"):  # a run that had stopped was resumed
                self._evaluate()
            return None

    def _micro_batches(self) -> MicroBatches:
        """Return training batches of the size that a forward has, beside the loader that trains."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # saves memory; the batches are few
        return MicroBatches(self.build_train_loader(cfg), cfg.SOLVER.ACCUMULATION_STEPS)

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        return scale_to_processes(cfg, num_workers)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Return the evaluators of the dataset's `evaluator_type`, as `evaluators.EVALUATORS` says."""
        return build_evaluator(cfg, dataset_name)
