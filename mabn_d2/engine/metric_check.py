"""The scalar that chooses the best checkpoint is one that the evaluation gives."""

from collections.abc import Collection, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..data.errors import did_you_mean
from ..data.requirements import DataRequirements, listed
from .errors import ConfigError
from .evaluators import EVALUATORS
from .hooks.best_checkpoint import TASKS, TASKS_OF_MODELS, best_metric, task_of
from .lazy_config import best_metric as lazy_best_metric
from .lazy_data import target

_AP = ("AP", "AP50", "AP75")
_COCO = (*_AP, "APs", "APm", "APl")
_LVIS = (*_COCO, "APr", "APc", "APf")
_PROPOSALS = tuple(f"AR{area}@{limit}" for limit in (100, 1000) for area in ("", "s", "m", "l"))
_PANOPTIC = tuple(f"{name}{part}" for name in ("PQ", "SQ", "RQ") for part in ("", "_th", "_st"))
# The scalars of each task, in Detectron2's order.
SCALARS: dict[type[DatasetEvaluator], dict[str, tuple[str, ...]]] = {
    COCOEvaluator: {
        "bbox": _COCO,
        "segm": _COCO,
        "keypoints": (*_AP, "APm", "APl"),
        "box_proposals": _PROPOSALS,
    },
    LVISEvaluator: {"bbox": _LVIS, "segm": _LVIS, "box_proposals": _PROPOSALS},
    PascalVOCDetectionEvaluator: {"bbox": _AP},
    SemSegEvaluator: {"sem_seg": ("mIoU", "fwIoU", "mACC", "pACC")},
    COCOPanopticEvaluator: {"panoptic_seg": _PANOPTIC},
    CityscapesInstanceEvaluator: {"segm": ("AP", "AP50")},
    CityscapesSemSegEvaluator: {"sem_seg": ("IoU", "iIoU", "IoU_sup", "iIoU_sup")},
}
# Scalars of one class begin so, and have its name behind a hyphen.
_OF_CLASSES = {
    COCOEvaluator: ("AP",),
    SemSegEvaluator: ("IoU", "ACC", "BoundaryIoU", "min(IoU, B-Iou)"),
}


def check_best_metric(cfg: CfgNode) -> None:
    """Check that the evaluation gives TEST.BEST_METRIC, once the datasets are read.

    Raises:
        ConfigError: if Detectron2's evaluators of the dataset give no such scalar of the model.
    """
    metric, names = best_metric(cfg), cfg.DATASETS.TEST
    if not metric:
        return
    dataset = metric.rpartition(f"/{task_of(metric)}/")[0] or names[0]
    kind = MetadataCatalog.get(dataset).evaluator_type
    key = f"TEST.BEST_METRIC is {cfg.TEST.BEST_METRIC!r}"
    _check(key, metric, EVALUATORS[kind], dataset, cfg.MODEL.META_ARCHITECTURE)


def check_lazy_best_metric(cfg: DictConfig) -> None:
    """Do what `check_best_metric` does for train.best_metric of a LazyConfig; own evaluators are not known."""
    given, nodes = OmegaConf.select(cfg, "train.best_metric"), cfg.dataloader.get("evaluator")
    if not given or nodes is None:
        return
    evaluators = [target(node) for node in (nodes if isinstance(nodes, ListConfig) else [nodes])]
    names = DataRequirements.from_lazy(cfg).test.value
    model = getattr(target(cfg.model), "__name__", "")
    key = f"train.best_metric is {given!r}"
    _check(key, lazy_best_metric(cfg), evaluators, names[0] if names else "", model)


def _check(
    key: str, metric: str, evaluators: Collection[Any], dataset: str, architecture: str
) -> None:
    task, name = task_of(metric), metric.rpartition("/")[2]
    if not all(evaluator in SCALARS for evaluator in evaluators):
        return
    if "-" in name and not _classes(task, dataset):
        return  # of one class: a COCO file may give its names later
    tasks = TASKS_OF_MODELS.get(architecture, TASKS)
    known = [
        scalar
        for evaluator in evaluators
        for scalar in scalars(evaluator, dataset)
        if task_of(scalar) in tasks
    ]
    if not known or task == "validation" or f"{task}/{name}" in known:
        return
    of_task = [scalar for scalar in known if task_of(scalar) == task] or known
    of_auto = "" if repr(metric) in key else f" ({task}/{name})"
    raise ConfigError(
        f"{key}{of_auto}, which the evaluation of {dataset!r} does not give"
        f"{did_you_mean(f'{task}/{name}', known)}: use one of {listed(of_task)}"
    )


def scalars(evaluator: type[DatasetEvaluator], dataset: str) -> list[str]:
    """Return the scalars of an evaluator: those of all classes, then those of each class."""
    found = [f"{task}/{name}" for task, names in SCALARS[evaluator].items() for name in names]
    for task in SCALARS[evaluator]:
        classes = _classes(task, dataset)
        if task == "box_proposals" or (evaluator is COCOEvaluator and len(classes) == 1):
            continue  # proposals have no classes; the AP of the only class is that of all
        found += [
            f"{task}/{kind}-{name}" for kind in _OF_CLASSES.get(evaluator, ()) for name in classes
        ]
    return found


def _classes(task: str, dataset: str) -> Sequence[str]:
    """Return the names of the classes of a task, as far as they are known before the records are."""
    key = "stuff_classes" if task == "sem_seg" else "thing_classes"
    return MetadataCatalog.get(dataset).get(key) or ()
