"""The checkpoint of the best evaluation."""

import json
import logging
import math
from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm

from ...checkpoint import SafeCheckpointer
from ...checkpoint.io import atomic_file

NAME = "model_best"
TASKS = ("bbox", "box_proposals", "keypoints", "segm", "sem_seg", "panoptic_seg", "validation")

# What TEST.BEST_METRIC "auto" is for some types of evaluators.
AUTO_METRIC = {
    "coco_panoptic_seg": "panoptic_seg/PQ",
    "sem_seg": "sem_seg/mIoU",
    "cityscapes_sem_seg": "sem_seg/IoU",
    "pascal_voc": "bbox/AP",
}
_OBJECTS = ("bbox", "segm", "keypoints")
# The tasks that Detectron2's architectures have outputs for.
TASKS_OF_MODELS = {
    "GeneralizedRCNN": _OBJECTS,
    "PanopticFPN": (*_OBJECTS, "sem_seg", "panoptic_seg"),
    "RetinaNet": ("bbox",),
    "FCOS": ("bbox",),
    "ProposalNetwork": ("box_proposals",),
    "SemanticSegmentor": ("sem_seg",),
}


class Best(NamedTuple):
    """The best evaluation so far.

    Attributes:
        metric: name of what is compared.
        value: its best value; None before the first finite one.
        iterations: iterations that were done when it was reached.
        evaluated: iterations that were done at the last evaluation.
    """

    metric: str
    value: float | None = None
    iterations: int = 0
    evaluated: int = 0


class BestCheckpoint(HookBase):
    """Writes `model_best.pth` after each evaluation that is better than all before.

    Detectron2's BestCheckpointer forgets the best value when a run is resumed, and lets
    `last_checkpoint` name model_best.pth, from which a resumed run would repeat iterations. Here
    `model_best.json` keeps the best value beside the file, and `last_checkpoint` stays as it is. A value
    that is not finite is never the best.

    Place it behind the hook that evaluates. All ranks know the best value of the main process.

    Args:
        period: iterations between evaluations; 0: only after the last iteration.
        checkpointer: what saves.
        metric: a scalar of the evaluation, such as "bbox/AP". Lower is better in those of the task "validation".
        key: what the config calls the metric, for messages.
    """

    def __init__(
        self,
        period: int,
        checkpointer: SafeCheckpointer,
        metric: str,
        key: str = "TEST.BEST_METRIC",
    ):
        self.period, self.checkpointer, self.key = period, checkpointer, key
        self.lower_is_better = task_of(metric) == "validation"
        self.best = Best(metric)
        self.file = Path(checkpointer.save_dir, f"{NAME}.json")

    def before_train(self) -> None:
        """Go on from the best value of the run that is resumed."""
        found = None
        if comm.is_main_process() and self.trainer.start_iter > 0 and self.file.is_file():
            found = self._read()
        found = comm.all_gather(found)[0]
        if found is None:
            return
        if found.metric == self.best.metric:
            self.best = found
        else:
            logging.getLogger(__name__).warning(
                f"{self.key} is {self.best.metric!r}, {self.file.name} is of {found.metric!r}: "
                "the best value so far is unknown, and the next evaluation replaces model_best.pth"
            )

    def _read(self) -> Best | None:
        try:
            return Best(**json.loads(self.file.read_text()))
        except (OSError, TypeError, ValueError) as error:
            logging.getLogger(__name__).warning(
                f"{self.file} can't be read ({error}): the best value so far is unknown, and the next "
                "evaluation replaces model_best.pth"
            )
            return None

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.period > 0 and done % self.period == 0 and done != self.trainer.max_iter:
            self._compare(done)

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._compare(self.trainer.max_iter)

    def _compare(self, done: int) -> None:
        metric, best = self.best.metric, self.best.value
        latest = self.trainer.storage.latest()
        value = comm.all_gather(latest.get(metric, (None,))[0])[0]  # the main process evaluates
        self.best = self.best._replace(evaluated=done)
        logger = logging.getLogger(__name__)
        if value is None:
            # Not those of each class.
            known = sorted(n for n in latest if task_of(n) in TASKS and "-" not in n)
            logger.warning(
                f"the evaluation gives no {metric} ({self.key}): it has {', '.join(known)}"
            )
        elif math.isfinite(value) and (
            best is None or (value < best if self.lower_is_better else value > best)
        ):
            self.best = self.best._replace(value=float(value), iterations=done)
            logger.info(f"{metric} {value:.3f} is the best so far: saved as {NAME}.pth")
            if comm.is_main_process():
                self.checkpointer.save(NAME, tag=False, iteration=done - 1)
        else:
            so_far = (
                "none is the best so far"
                if best is None
                else f"best {best:.3f} after {self.best.iterations} iterations"
            )
            logger.info(f"{metric} {value:.3f}, {so_far}")
        if comm.is_main_process():  # after the checkpoint that it describes
            with atomic_file(self.file) as file:
                file.write(json.dumps(self.best._asdict()).encode())


def task_of(metric: str) -> str:
    """Return the task of a scalar; several test sets put their names in front of it."""
    return metric.rpartition("/")[0].rpartition("/")[2]


def best_metric(cfg: CfgNode) -> str:
    """Return the scalar that TEST.BEST_METRIC chooses; "" if there is none, or no evaluation."""
    metric, names = cfg.TEST.BEST_METRIC, cfg.DATASETS.TEST
    if not names or metric != "auto":
        return metric if names else ""
    several = f"{names[0]}/" if len(names) > 1 else ""
    kind = MetadataCatalog.get(names[0]).get("evaluator_type")
    of_model = auto_metric(cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_ON)
    return several + AUTO_METRIC.get(kind, of_model)


def auto_metric(architecture: str, masks: bool) -> str:
    """Return the scalar of a model that "auto" chooses, where the evaluator does not decide.

    Args:
        architecture: name of its class; one that is not Detectron2's has objects.
        masks: whether the config asks for masks, which only some architectures have.
    """
    tasks = TASKS_OF_MODELS.get(architecture, _OBJECTS)
    if masks and "segm" in tasks:
        return "segm/AP"
    if "bbox" in tasks:
        return "bbox/AP"
    return {"box_proposals": "box_proposals/AR@1000", "sem_seg": "sem_seg/mIoU"}[tasks[0]]
