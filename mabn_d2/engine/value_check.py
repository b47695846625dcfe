"""Values of Detectron2's keys that it looks up late, or never checks: names, choices, ranges, widths."""

import logging
import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY

from ..config_keys import get_key
from ..data.errors import did_you_mean
from ..modeling.norm_table import DETECTRON2_NUM_GROUPS, NORMS
from ..solver import OPTIMIZERS
from .errors import ConfigError

_logger = logging.getLogger(__name__)

# Keys whose value names something registered.
REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
}
# Values that are no registered names, but mean that there is no such part.
_NO_PART = {
    "MODEL.PROPOSAL_GENERATOR.NAME": ("PrecomputedProposals",),
    "MODEL.ROI_BOX_HEAD.NAME": ("",),
}
_POOLERS = ("ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated")
# Keys with one of some values.
CHOICES = {
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "WarmupStepWithFixedGammaLR",
    ),
    "SOLVER.OPTIMIZER": tuple(OPTIMIZERS),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
    "DATALOADER.BAD_INPUT": ("stop", "skip"),
    "INPUT.FORMAT": ("BGR", "RGB", "L"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "MODEL.RESNETS.DEPTH": (10, 18, 34, 50, 101, 152),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": ("smooth_l1", "giou", "diou", "ciou"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": ("smooth_l1", "giou", "diou", "ciou"),
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": ("smooth_l1", "giou", "diou", "ciou"),
}
# Words for a range, and what they mean for one number.
RANGES: dict[str, Callable[[float], bool]] = {
    "above 0": lambda x: 0 < x < math.inf,
    "at least 0": lambda x: 0 <= x < math.inf,
    "a whole number above 0": lambda x: isinstance(x, int) and x > 0,
    "a whole number, at least 0": lambda x: isinstance(x, int) and x >= 0,
    "between 0 and 1": lambda x: 0 <= x <= 1,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
}
# Keys with a number, or with a list of them, for each of which the range holds.
NUMBERS = {
    "above 0": (
        "SOLVER.BASE_LR",
        "SOLVER.GAMMA",
        "SOLVER.BIAS_LR_FACTOR",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
        "MODEL.PIXEL_STD",
        "MODEL.ANCHOR_GENERATOR.SIZES",
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
        "DATALOADER.RANDOM_SUBSET_RATIO",
    ),
    "at least 0": (
        "SOLVER.WEIGHT_DECAY",
        "SOLVER.WEIGHT_DECAY_NORM",
        "SOLVER.WEIGHT_DECAY_BIAS",
        "SOLVER.BASE_LR_END",
        "SOLVER.WARMUP_FACTOR",
        "DATALOADER.REPEAT_THRESHOLD",
        "MODEL.RPN.SMOOTH_L1_BETA",
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA",
        "MODEL.ANCHOR_GENERATOR.OFFSET",
    ),
    "a whole number above 0": (
        "SOLVER.MAX_ITER",
        "SOLVER.IMS_PER_BATCH",
        "SOLVER.CHECKPOINT_PERIOD",
        "SOLVER.NUM_DECAYS",
        "INPUT.MIN_SIZE_TRAIN",
        "INPUT.MAX_SIZE_TRAIN",
        "INPUT.MAX_SIZE_TEST",
        "TEST.DETECTIONS_PER_IMAGE",
        "TEST.PRECISE_BN.NUM_ITER",
        "MODEL.ROI_HEADS.NUM_CLASSES",
        "MODEL.RETINANET.NUM_CLASSES",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
        "MODEL.GN.NUM_GROUPS",
        "MODEL.RESNETS.NUM_GROUPS",
        "MODEL.RESNETS.WIDTH_PER_GROUP",
        "MODEL.RESNETS.STEM_OUT_CHANNELS",
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        "MODEL.FPN.OUT_CHANNELS",
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
        "MODEL.RPN.PRE_NMS_TOPK_TEST",
        "MODEL.RPN.POST_NMS_TOPK_TRAIN",
        "MODEL.RPN.POST_NMS_TOPK_TEST",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION",
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION",
        "TEST.AUG.MIN_SIZES",
        "TEST.AUG.MAX_SIZE",
    ),
    "a whole number, at least 0": (
        "SOLVER.WARMUP_ITERS",
        "SOLVER.STEPS",
        "SOLVER.REFERENCE_WORLD_SIZE",
        "TEST.EVAL_PERIOD",
        "INPUT.MIN_SIZE_TEST",
        "DATALOADER.NUM_WORKERS",
        "VIS_PERIOD",
        "MODEL.ROI_BOX_HEAD.NUM_CONV",
        "MODEL.ROI_BOX_HEAD.NUM_FC",
        "MODEL.ROI_MASK_HEAD.NUM_CONV",
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO",
        "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO",
        "MODEL.MABN.LOG_PERIOD",
        "SOLVER.CHECKPOINTS_TO_KEEP",
        "TEST.PICTURES",
    ),
    "between 0 and 1": (
        "MODEL.RPN.POSITIVE_FRACTION",
        "MODEL.RPN.NMS_THRESH",
        "MODEL.RPN.IOU_THRESHOLDS",
        "MODEL.ROI_HEADS.POSITIVE_FRACTION",
        "MODEL.ROI_HEADS.NMS_THRESH_TEST",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        "MODEL.ROI_HEADS.IOU_THRESHOLDS",
        "MODEL.RETINANET.NMS_THRESH_TEST",
        "MODEL.RETINANET.SCORE_THRESH_TEST",
    ),
    "at least 0 and below 1": ("SOLVER.MOMENTUM",),
}
# Keys whose channels a norm of the same node covers.
WIDTHS = {
    "MODEL.RESNETS.NORM": ("RESNETS.STEM_OUT_CHANNELS", "RESNETS.RES2_OUT_CHANNELS"),
    "MODEL.FPN.NORM": ("FPN.OUT_CHANNELS",),
    "MODEL.ROI_BOX_HEAD.NORM": ("ROI_BOX_HEAD.CONV_DIM",),
    "MODEL.ROI_MASK_HEAD.NORM": ("ROI_MASK_HEAD.CONV_DIM",),
    "MODEL.SEM_SEG_HEAD.NORM": ("SEM_SEG_HEAD.CONVS_DIM",),
    "MODEL.RETINANET.NORM": ("FPN.OUT_CHANNELS",),
}


def check_values(cfg: CfgNode, train: bool = True, own: Container[str] = ()) -> None:
    """Check the values of Detectron2's keys, each by itself and some against each other.

    Args:
        train: False where the config is for evaluation only: what only trains is not looked at.
        own: keys of `CHOICES` that a user's own code reads, and that may have other values.
    Raises:
        ConfigError: naming the key, its value and what it may be.
    """
    for key, registry in REGISTRIES.items():
        value, known = get_key(cfg, key), [name for name, _ in registry]
        if value is not None and value not in known and value not in _NO_PART.get(key, ()):
            raise ConfigError(
                f"{key} is {value!r}, which is not registered{did_you_mean(value, known)}: use one of "
                f"{', '.join(known)}, or import the module that registers it"
            )
    for key, choices in CHOICES.items():
        value = get_key(cfg, key)
        if value is not None and value not in choices and key not in own and _is_used(cfg, key):
            raise ConfigError(
                f"{key} is {value!r}{did_you_mean(value, choices)}: use one of "
                f"{', '.join(map(str, choices))}"
            )
    for words, keys in NUMBERS.items():
        for key in keys:
            value = get_key(cfg, key)
            if not all(_in_range(x, words) for x in _numbers(value)):
                raise ConfigError(f"{key} is {_shown(value)}: give {_what(value, words)}")
    _check_model(cfg)
    _check_expected_results(cfg)
    if train:
        _check_schedule(cfg)
        _check_input(cfg)
        if cfg.SEED >= 2**32:
            raise ConfigError(f"SEED is {cfg.SEED}: give a number below 2**32, or -1 for none")


def _check_expected_results(cfg: CfgNode) -> None:
    for row in cfg.TEST.EXPECTED_RESULTS:
        if not (
            isinstance(row, (list, tuple))
            and len(row) == 4
            and all(isinstance(name, str) for name in row[:2])
            and all(isinstance(number, (int, float)) for number in row[2:])
        ):
            raise ConfigError(
                f"TEST.EXPECTED_RESULTS has {row!r}: give [task, metric, value, tolerance], such as "
                "['bbox', 'AP', 38.5, 0.2]"
            )


def _check_model(cfg: CfgNode) -> None:
    model = cfg.MODEL
    try:
        torch.device(model.DEVICE)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f'MODEL.DEVICE is {model.DEVICE!r}, which torch does not know: use "cuda" or "cpu"'
        ) from error
    if len(model.PIXEL_MEAN) != len(model.PIXEL_STD):
        raise ConfigError(
            f"MODEL.PIXEL_MEAN has {len(model.PIXEL_MEAN)} numbers and MODEL.PIXEL_STD "
            f"{len(model.PIXEL_STD)}: give one for each channel of INPUT.FORMAT {cfg.INPUT.FORMAT}"
        )
    if not -1 <= model.BACKBONE.FREEZE_AT <= 5:
        raise ConfigError(
            f"MODEL.BACKBONE.FREEZE_AT is {model.BACKBONE.FREEZE_AT}: use 0 for none, up to 5 for all "
            "stages of a ResNet"
        )
    for key, widths in WIDTHS.items():
        if get_key(cfg, key) == "GN" and _is_used(cfg, key):
            # Detectron2 makes its own number of groups first.
            groups = math.lcm(DETECTRON2_NUM_GROUPS, model.GN.NUM_GROUPS)
            for name in widths:
                if get_key(cfg, f"MODEL.{name}") % groups:
                    raise ConfigError(
                        f"MODEL.{name} is {get_key(cfg, f'MODEL.{name}')}, which {groups} does not divide, "
                        f'but {key} "GN" makes {model.GN.NUM_GROUPS} groups (MODEL.GN.NUM_GROUPS): use a '
                        f"multiple of {groups}, or another norm"
                    )
    if _is_used(cfg, "MODEL.ANCHOR_GENERATOR.SIZES"):
        _check_anchors(cfg)
    _check_lengths(cfg)
    if cfg.TEST.AUG.ENABLED:
        _check_augmentation(model)


def _check_augmentation(model: CfgNode) -> None:
    """What Detectron2 has test-time augmentation for, and asserts at the first evaluation."""
    for fits, without in (
        (
            model.META_ARCHITECTURE == "GeneralizedRCNN",
            f"for GeneralizedRCNN only, not for MODEL.META_ARCHITECTURE {model.META_ARCHITECTURE}",
        ),
        (not model.KEYPOINT_ON, "not for keypoints (MODEL.KEYPOINT_ON True)"),
        (not model.LOAD_PROPOSALS, "not for proposals from files (MODEL.LOAD_PROPOSALS True)"),
    ):
        if not fits:
            raise ConfigError(
                f"TEST.AUG.ENABLED is True, but Detectron2 has test-time augmentation {without}: set "
                "it to False"
            )


def _check_lengths(cfg: CfgNode) -> None:
    """Lists whose length Detectron2 asserts when the model or the first image comes."""
    for key in ("MODEL.RPN", "MODEL.ROI_BOX_HEAD", "MODEL.RETINANET"):
        weights = get_key(cfg, f"{key}.BBOX_REG_WEIGHTS")
        if (
            weights is not None
            and _is_used(cfg, f"{key}.BBOX_REG_WEIGHTS")
            and len(weights) not in (4, 5)
        ):
            raise ConfigError(
                f"{key}.BBOX_REG_WEIGHTS is {_shown(weights)}: give four numbers, for x, y, width and "
                "height"
            )


def _check_input(cfg: CfgNode) -> None:
    """How images are resized and cropped; what is wrong there would be blamed on an image."""
    sizes, sampling = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    if not sizes:
        raise ConfigError("INPUT.MIN_SIZE_TRAIN is empty: give at least one size in pixels")
    if sampling == "range" and (len(sizes) != 2 or sizes[0] > sizes[1]):
        raise ConfigError(
            f"INPUT.MIN_SIZE_TRAIN is {_shown(sizes)} and INPUT.MIN_SIZE_TRAIN_SAMPLING 'range': give "
            "the smallest and the largest size, or use 'choice'"
        )
    crop = cfg.INPUT.CROP
    if not crop.ENABLED:
        return
    relative = crop.TYPE.startswith("relative")
    numbers = all(
        (0 < x <= 1) if relative else (float(x).is_integer() and x >= 1) for x in crop.SIZE
    )
    rising = crop.TYPE != "absolute_range" or crop.SIZE[0] <= crop.SIZE[-1]
    if len(crop.SIZE) != 2 or not numbers or not rising:
        wanted = {
            "relative": "two shares of the image, above 0 and up to 1",
            "relative_range": "the smallest shares of the image, above 0 and up to 1",
            "absolute": "height and width in whole pixels",
            "absolute_range": "the smallest and the largest side in whole pixels",
        }
        raise ConfigError(
            f"INPUT.CROP.SIZE is {_shown(crop.SIZE)} and INPUT.CROP.TYPE {crop.TYPE!r}: give "
            f"{wanted[crop.TYPE]}"
        )


def _check_anchors(cfg: CfgNode) -> None:
    """A list of sizes or ratios holds for all feature maps, or there is one for each of them."""
    node = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "RPN"
    features = cfg.MODEL[node].IN_FEATURES
    for name in ("SIZES", "ASPECT_RATIOS"):
        key, value = f"MODEL.ANCHOR_GENERATOR.{name}", cfg.MODEL.ANCHOR_GENERATOR[name]
        nested = all(isinstance(item, Sequence) for item in value)
        if not value or (nested and not all(value)):
            raise ConfigError(f"{key} is {_shown(value)}: give at least one number for each level")
        if nested and len(value) not in (1, len(features)):
            raise ConfigError(
                f"{key} has {len(value)} lists for the {len(features)} feature maps of "
                f"MODEL.{node}.IN_FEATURES ({', '.join(features)}): give one list, or one for each"
            )


def check_reference_world_size(cfg: CfgNode) -> None:
    """Check what Detectron2 asserts before it scales a config to the number of processes.

    Raises:
        ConfigError: naming SOLVER.REFERENCE_WORLD_SIZE, its value and what it may be.
    """
    world, images = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if world < 0 or (world and images % world):
        raise ConfigError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {world}, which does not divide SOLVER.IMS_PER_BATCH "
            f"{images}: give the number of processes that the config was written for, or 0"
        )


def _check_schedule(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    if list(solver.STEPS) != sorted(set(solver.STEPS)):
        raise ConfigError(f"SOLVER.STEPS is {_shown(solver.STEPS)}: give rising iterations")
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and {0, solver.MAX_ITER} & {*solver.STEPS}:
        raise ConfigError(
            f"SOLVER.STEPS is {_shown(solver.STEPS)} and SOLVER.MAX_ITER {solver.MAX_ITER}: give "
            "iterations above 0 and below MAX_ITER, or () for no decay"
        )
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR" and solver.BASE_LR_END > solver.BASE_LR:
        raise ConfigError(
            f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}, more than SOLVER.BASE_LR {solver.BASE_LR}: "
            "give the rate at the end, such as 0.0"
        )
    check_reference_world_size(cfg)
    if solver.WARMUP_ITERS > solver.MAX_ITER:
        _logger.warning(
            f"SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS}, more than SOLVER.MAX_ITER "
            f"{solver.MAX_ITER}: the learning rate never reaches SOLVER.BASE_LR"
        )
    for name in used_norms(cfg):
        warn_of_norm_schedule(name, norm_schedule(cfg, name), "SOLVER.MAX_ITER", solver.MAX_ITER)


def norm_nodes(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, CfgNode]]:
    """Yield (key, node) of every node that has a NORM."""
    for name, value in node.items():
        if hasattr(value, "items"):
            key = f"{prefix}{name}"
            if isinstance(value.get("NORM"), str):
                yield key, value
            yield from norm_nodes(value, f"{key}.")


def used_norms(cfg: CfgNode) -> list[str]:
    """Return the norms of `NORMS` that a config names."""
    named = {node.NORM for _, node in norm_nodes(cfg)}
    if cfg.MODEL.BACKBONE.NAME.startswith("build_mabn_"):
        named.add("MABN")
    return [name for name in NORMS if name in named]


def norm_schedule(cfg: CfgNode, name: str) -> dict[str, int]:
    """Return {key: value} of the settings of a norm that are optimizer iterations."""
    keys = [key.upper() for key in NORMS[name].schedule]
    return {f"MODEL.{name}.{key}": cfg.MODEL[name][key] for key in keys}


def warn_of_norm_schedule(name: str, values: dict[str, int], key: str, max_iter: int) -> None:
    """Warn if the training ends before the schedule of a norm; of the first such setting.

    Args:
        name: of the norm in `NORMS`.
        values: what the config calls the settings of its schedule, and their values.
        key: what the config calls `max_iter`.
        max_iter: iterations of the training.
    """
    for (setting, value), what in zip(values.items(), NORMS[name].schedule.values(), strict=True):
        if value >= max_iter:
            _logger.warning(
                f"{setting} is {value} and {key} {max_iter}: {what}; scale it with the length of the "
                "training"
            )
            return


def warn_of_window(batch_size: int, window: int, images: int, key: str, remedy: str) -> None:
    """Warn if MABN's windows do not span the images that they are meant to.

    Args:
        batch_size: the value of `key`, images in a normalization batch.
        window: forwards that the windows span.
        images: in one forward.
        key: what the config calls the batch size.
        remedy: what to set.
    """
    if batch_size != images:
        _logger.warning(
            f"{key} is {batch_size}, but one forward has {images} images, so that the windows of {window} "
            f"forwards span {window * images} images, not {window * batch_size}: set {remedy}"
        )


def _is_used(cfg: CfgNode, key: str) -> bool:
    """Return whether the model of a config reads a key, as far as that is known here."""
    model = cfg.MODEL
    resnet, retinanet = "resnet" in model.BACKBONE.NAME, model.META_ARCHITECTURE == "RetinaNet"
    has_rois = "RCNN" in model.META_ARCHITECTURE or model.META_ARCHITECTURE == "PanopticFPN"
    fpn = "fpn" in model.BACKBONE.NAME
    rules = {
        "MODEL.RESNETS.": resnet,
        "MODEL.FPN.": fpn,
        "MODEL.RETINANET.": retinanet,
        "MODEL.ROI_BOX_HEAD.NORM": has_rois and model.ROI_BOX_HEAD.NUM_CONV > 0,
        "MODEL.ROI_MASK_HEAD.": has_rois and model.MASK_ON,
        "MODEL.ROI_KEYPOINT_HEAD.": has_rois and model.KEYPOINT_ON,
        "MODEL.SEM_SEG_HEAD.": model.META_ARCHITECTURE in ("SemanticSegmentor", "PanopticFPN"),
        "MODEL.ANCHOR_GENERATOR.": retinanet
        or (has_rois and model.PROPOSAL_GENERATOR.NAME in ("RPN", "RRPN")),
        "SOLVER.CLIP_GRADIENTS.": cfg.SOLVER.CLIP_GRADIENTS.ENABLED,
        "INPUT.CROP.": cfg.INPUT.CROP.ENABLED,
    }
    return all(used for prefix, used in rules.items() if key.startswith(prefix))


def _numbers(value: Any) -> Iterator[Any]:
    """Yield the numbers in a value, a list or nested lists; None is no number."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    elif value is not None:
        yield value


def _in_range(x: Any, words: str) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and RANGES[words](x)


def _shown(value: Any) -> list[Any] | str:
    return list(value) if isinstance(value, tuple) else repr(value)


def _what(value: Any, words: str) -> str:
    if isinstance(value, (list, tuple)):
        return f"numbers, each {words}"
    return words if words.startswith("a ") else f"a number {words}"
