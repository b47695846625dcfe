"""Evaluators, by the `evaluator_type` of a dataset's metadata."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

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
from detectron2.utils import comm

from ..data.packages import INTERNAL, remedy
from .errors import ConfigError

_Builder = Callable[[CfgNode, str, str], DatasetEvaluator]


def _coco(cfg: CfgNode, name: str, folder: str) -> COCOEvaluator:
    # The converted copy of a dataset that is no COCO file may be of another run, so it is not reused.
    # COCO counts the best 100 of an image; a config that asks for more has images with more objects.
    return COCOEvaluator(
        name,
        output_dir=folder,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        max_dets_per_image=max(100, cfg.TEST.DETECTIONS_PER_IMAGE),
        allow_cached_coco=False,
    )


class _CityscapesInstanceEvaluator(CityscapesInstanceEvaluator):
    """Leaves out the file matches.json, of all matches.

    cityscapesscripts writes it into the working directory for every evaluation, and fails where numpy
    counts in integers of its own.
    """

    def evaluate(self) -> dict[str, Any] | None:
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as script

        original, script.writeDict2JSON = script.writeDict2JSON, lambda content, file: None
        try:
            return super().evaluate()
        finally:
            script.writeDict2JSON = original


def _semantic(cfg: CfgNode, name: str, folder: str) -> SemSegEvaluator:
    return SemSegEvaluator(name, output_dir=folder)


# The evaluators of each type; a builder takes the config, the name of the dataset and the folder for results.
EVALUATORS: dict[str, dict[type[DatasetEvaluator], _Builder]] = {
    "coco": {COCOEvaluator: _coco},
    "coco_panoptic_seg": {
        SemSegEvaluator: _semantic,
        COCOEvaluator: _coco,
        COCOPanopticEvaluator: lambda cfg, name, folder: COCOPanopticEvaluator(name, folder),
    },
    "lvis": {LVISEvaluator: lambda cfg, name, folder: LVISEvaluator(name, output_dir=folder)},
    "pascal_voc": {
        PascalVOCDetectionEvaluator: lambda cfg, name, folder: PascalVOCDetectionEvaluator(name)
    },
    "sem_seg": {SemSegEvaluator: _semantic},
    "cityscapes_instance": {
        CityscapesInstanceEvaluator: lambda cfg, name, folder: _CityscapesInstanceEvaluator(name)
    },
    "cityscapes_sem_seg": {
        CityscapesSemSegEvaluator: lambda cfg, name, folder: CityscapesSemSegEvaluator(name)
    },
}
# Packages that some evaluators import when they are built or later.
PACKAGES: dict[type[DatasetEvaluator], str] = {
    LVISEvaluator: "lvis",
    COCOPanopticEvaluator: "panopticapi",
    CityscapesInstanceEvaluator: "cityscapesscripts",
    CityscapesSemSegEvaluator: "cityscapesscripts",
}
# What the evaluators of a type compare, where it is not the objects, and the models that give it.
OUTPUTS = {
    "pascal_voc": "objects of classes",
    "cityscapes_instance": "objects of classes",
    "sem_seg": "semantic segmentations",
    "cityscapes_sem_seg": "semantic segmentations",
    "coco_panoptic_seg": "panoptic segmentations",
}
_DETECTORS = ("GeneralizedRCNN", "RetinaNet", "FCOS", "PanopticFPN")
ARCHITECTURES = {
    "objects": (*_DETECTORS, "ProposalNetwork"),
    "objects of classes": _DETECTORS,
    "semantic segmentations": ("SemanticSegmentor", "PanopticFPN"),
    "panoptic segmentations": ("PanopticFPN",),
}
KNOWN = {name for names in ARCHITECTURES.values() for name in names}


def missing_package(*evaluators: Any) -> str | None:
    """Return the first package that classes of evaluators need and that is not installed, or None."""
    for evaluator in evaluators:
        for known, package in PACKAGES.items():
            if isinstance(evaluator, type) and issubclass(evaluator, known):
                code = getattr(getattr(evaluator, "process", None), "__code__", None)
                if code and any(name.startswith(INTERNAL) for name in code.co_names):
                    package = INTERNAL
                if importlib.util.find_spec(package) is None:
                    return package
    return None


def check_evaluators(cfg: CfgNode) -> None:
    """Check that every dataset of DATASETS.TEST can be evaluated.

    Raises:
        ConfigError: if a dataset has no `evaluator_type`, or one that is not in EVALUATORS, if a
            package is missing, or if the model does not give what is evaluated.
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
        # A package is of no use to a model that does not fit.
        _check_outputs(cfg, name, kind)
        if package := missing_package(*EVALUATORS[kind]):
            raise ConfigError(
                f"DATASETS.TEST names {name!r}, whose evaluator needs the package {package}: "
                f"{remedy(package)}, or set DATASETS.TEST ()"
            )


def _check_outputs(cfg: CfgNode, name: str, kind: str) -> None:
    """The model gives what the evaluators of a dataset compare; a user's own model is not known."""
    model = cfg.MODEL.META_ARCHITECTURE
    output = OUTPUTS.get(kind, "objects")
    if model in KNOWN and model not in ARCHITECTURES[output]:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {model!r}, but DATASETS.TEST names {name!r}, whose evaluator "
            f"({kind}) compares {output}: use {' or '.join(ARCHITECTURES[output])}, or another dataset"
        )
    if kind == "cityscapes_instance" and not cfg.MODEL.MASK_ON:
        raise ConfigError(
            f"MODEL.MASK_ON is False, but DATASETS.TEST names {name!r}, whose evaluator ({kind}) "
            "compares masks: set MODEL.MASK_ON True"
        )
    if kind.startswith("cityscapes") and comm.get_local_size() != comm.get_world_size():
        raise ConfigError(
            f"DATASETS.TEST names {name!r}, whose evaluator ({kind}) does not work on several machines "
            "(--num-machines): train on one, or set DATASETS.TEST () and evaluate afterwards"
        )


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
    return DatasetEvaluators([build(cfg, name, folder) for build in EVALUATORS[kind].values()])
