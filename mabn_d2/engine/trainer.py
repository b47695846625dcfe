"""The trainer that tools/train_net.py runs."""

import logging
import os
import weakref

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from ..data.loader import build_train_loader, mix
from ..solver import build_optimizer
from .step import GuardedTrainer


class SeedEachIteration(HookBase):
    """Seeds all generators before every iteration, so that a resumed run draws what the straight
    one drew (samples of anchors and RoIs, dropout)."""

    def __init__(self, seed):
        self.seed = seed

    def before_step(self):
        seed_all_rng(mix(self.seed, comm.get_rank(), self.trainer.iter))


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer, for MABN.

    What differs: WEIGHT_DECAY_NORM reaches MABN; SOLVER.AMP and several processes work on CPU too;
    bad batches are skipped (`GuardedTrainer`); evaluators for COCO; and with SEED >= 0 a resumed
    run equals the straight one (exactly so on CPU).

    Each rank has MABN statistics of its own, as it has BatchNorm's in Detectron2; rank 0's are
    evaluated by rank 0 and saved.
    """

    def __init__(self, cfg):
        TrainerBase.__init__(self)  # DefaultTrainer's own lets no process train on CPU but one
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
        devices = {"device_ids": None} if on_cpu else {}
        model = create_ddp_model(model, broadcast_buffers=False, **devices)
        self._trainer = GuardedTrainer(model, loader, optimizer, amp=cfg.SOLVER.AMP.ENABLED)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        # A proxy, because the checkpointer would otherwise keep the trainer alive, and it the model.
        self.checkpointer = DetectionCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume=True):
        super().resume_or_load(resume)
        self.data_loader.batch_sampler.start = self.start_iter

    def build_hooks(self):
        seeds = [SeedEachIteration(self.cfg.SEED)] if self.cfg.SEED >= 0 else []
        return [*seeds, *super().build_hooks()]

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        """Return the evaluator of the dataset's `evaluator_type`: a COCO one.

        Raises:
            ValueError: for a type that is not COCO's.
        """
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        evaluators = {
            "coco": [COCOEvaluator],
            "coco_panoptic_seg": [SemSegEvaluator, COCOEvaluator, COCOPanopticEvaluator],
        }
        if kind not in evaluators:
            raise ValueError(
                f"no evaluator for {dataset_name} of type {kind!r}: use one of "
                f"{', '.join(evaluators)}, or override Trainer.build_evaluator"
            )
        return DatasetEvaluators([e(dataset_name, output_dir=folder) for e in evaluators[kind]])
