"""Evaluators, by the `evaluator_type` of a dataset's metadata."""

import importlib.util
import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.evaluation.pascal_voc_evaluation import parse_rec

from .errors import ConfigError


def _coco(cfg: CfgNode, name: str, folder: str) -> COCOEvaluator:
    # The converted copy of a dataset that is no COCO file may be of another run, so it is not reused.
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
    return COCOEvaluator(name, output_dir=folder, kpt_oks_sigmas=sigmas, allow_cached_coco=False)


def _semantic(cfg: CfgNode, name: str, folder: str) -> SemSegEvaluator:
    return SemSegEvaluator(name, output_dir=folder)


# Each takes the config, the name of the dataset and the folder for results.
EVALUATORS = {
    "coco": [_coco],
    "coco_panoptic_seg": [
        _semantic,
        _coco,
        lambda cfg, name, folder: COCOPanopticEvaluator(name, folder),
    ],
    "lvis": [lambda cfg, name, folder: LVISEvaluator(name, output_dir=folder)],
    "pascal_voc": [lambda cfg, name, folder: PascalVOCDetectionEvaluator(name)],
    "sem_seg": [_semantic],
    "cityscapes_instance": [lambda cfg, name, folder: CityscapesInstanceEvaluator(name)],
    "cityscapes_sem_seg": [lambda cfg, name, folder: CityscapesSemSegEvaluator(name)],
}
# Packages that some evaluators import when they are built or later.
PACKAGES = {
    "lvis": "lvis",
    "coco_panoptic_seg": "panopticapi",
    "cityscapes_instance": "cityscapesscripts",
    "cityscapes_sem_seg": "cityscapesscripts",
}


def check_evaluators(cfg: CfgNode) -> None:
    """Check that every dataset of DATASETS.TEST can be evaluated.

    Raises:
        ConfigError: if a dataset has no `evaluator_type`, or one that is not in EVALUATORS, or if a
            package is missing.
    """
    for name in cfg.DATASETS.TEST:
        kind = MetadataCatalog.get(name).get("evaluator_type")
        if kind is None:
            raise ConfigError(
                f"DATASETS.TEST names {name!r}, which has no evaluator_type: set it with "
                f'MetadataCatalog.get({name!r}).set(evaluator_type="coco"), or override '
                "Trainer.build_evaluator"
            )
        if kind not in EVALUATORS:
            raise ConfigError(
                f"DATASETS.TEST names {name!r}, whose evaluator_type is {kind!r}: use one of "
                f"{', '.join(EVALUATORS)}, or override Trainer.build_evaluator"
            )
        package = PACKAGES.get(kind)
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"DATASETS.TEST names {name!r}, whose evaluator needs the package {package}: install "
                "it, or set DATASETS.TEST ()"
            )


def check_pascal_voc(cfg: CfgNode) -> None:
    """Check that Detectron2's evaluator can read the XML files of the Pascal VOC sets in DATASETS.TEST.

    It needs more of each object than the training does: pose, truncated, difficult and whole pixels.

    Raises:
        ConfigError: if it can't.
    """
    for name in cfg.DATASETS.TEST:
        metadata = MetadataCatalog.get(name)
        if metadata.get("evaluator_type") != "pascal_voc":
            continue
        folder, images = Path(metadata.dirname), f"ImageSets/Main/{metadata.split}.txt"
        for image in (folder / images).read_text().split():
            file = folder / "Annotations" / f"{image}.xml"
            try:
                parse_rec(str(file))  # the evaluator uses the result again
            except (AttributeError, ValueError) as error:
                raise ConfigError(
                    f"DATASETS.TEST names {name!r}, but {file} can't be evaluated ({error}): each "
                    "object needs pose, truncated, difficult and bndbox in whole pixels"
                ) from error


def build_evaluator(cfg: CfgNode, name: str) -> DatasetEvaluator:
    """Return the evaluators of a dataset, which write their results below OUTPUT_DIR.

    Raises:
        ConfigError: as `check_evaluators` does.
    """
    one = cfg.clone()
    one.defrost()
    one.DATASETS.TEST = (name,)
    check_evaluators(one)
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    if len(cfg.DATASETS.TEST) > 1:  # the files of each have the same names
        folder = os.path.join(folder, name)
    kind = MetadataCatalog.get(name).evaluator_type
    return DatasetEvaluators([build(cfg, name, folder) for build in EVALUATORS[kind]])
