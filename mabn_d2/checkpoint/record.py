"""Properties that weights do not show: recorded in the file as config keys, compared with the config."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode

from ..config_keys import get_key
from .description import CONFIG
from .io import CheckpointError

KEY = "mabn_d2"  # of the record in a checkpoint
# With MABN in ResNet and FPN these build the same model. Older files name the second one.
SAME_WITH_MABN = {"build_mabn_resnet_fpn_backbone", "build_any_norm_resnet_fpn_backbone"}

# Keys that a model with the same weights computes something else with.
_OF_WEIGHTS = (
    "INPUT.FORMAT",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "MODEL.ANCHOR_GENERATOR.SIZES",
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
    "MODEL.RPN.BBOX_REG_WEIGHTS",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS",
    "MODEL.RETINANET.BBOX_REG_WEIGHTS",
    "MODEL.MABN.EPS",
)
# Keys that change the result of an evaluation besides.
_OF_EVALUATION = (
    "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TEST",
    "TEST.DETECTIONS_PER_IMAGE",
    "MODEL.RPN.NMS_THRESH",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "MODEL.RETINANET.NMS_THRESH_TEST",
    "MODEL.RETINANET.SCORE_THRESH_TEST",
)

FROM_BATCH_NORM = "was converted from BatchNorm, whose running_var does not fit MABN"


def recorded(
    source: Mapping[str, Any],
    stride_in_1x1: bool | None,
    channel_order: str | None,
    pixel_mean: Sequence[float] | None,
    pixel_std: Sequence[float] | None,
) -> dict[str, Any]:
    """Return {config key: value}: what is given, or if None what `source`, such a dict, says.

    Raises:
        CheckpointError: for a value that no config can have.
    """
    if channel_order not in (None, "BGR", "RGB"):
        raise CheckpointError(f"channel order {channel_order!r}: use BGR or RGB")
    for name, value in (("mean", pixel_mean), ("std", pixel_std)):
        if value is not None and len(value) != 3:
            raise CheckpointError(f"pixel {name} {value}: give 3 numbers, in the channels' order")
    given = {
        "MODEL.RESNETS.STRIDE_IN_1X1": stride_in_1x1,
        "INPUT.FORMAT": channel_order,
        "MODEL.PIXEL_MEAN": pixel_mean and list(pixel_mean),
        "MODEL.PIXEL_STD": pixel_std and list(pixel_std),
    }
    return dict(source) | {key: value for key, value in given.items() if value is not None}


def checkpoint_of(
    state: Mapping[str, torch.Tensor],
    source: str,
    config: Mapping[str, Any],
    dropped: Mapping[str, Sequence[str]],
    recalibrate: bool,
) -> dict[str, Any]:
    """Return a Detectron2 checkpoint of `state` with its record.

    Args:
        recalibrate: whether `running_var` is not that of the weights, so that a training which
            starts from them has to compute it first.
    """
    return {
        "model": state,
        "__author__": "mabn_d2",  # by which Detectron2 knows a .pkl with its own names
        KEY: {
            "source": source,
            "config": config,
            "dropped": {rule: names for rule, names in dropped.items() if names},
            "recalibrate": recalibrate,
        },
    }


def check_recalibrated(record: Mapping[str, Any] | None, source: str) -> None:
    """Check that a file may be evaluated.

    Args:
        record: the checkpoint's entry "mabn_d2"; None if it has none.
        source: the file, for the message.
    Raises:
        CheckpointError: if its `running_var` is still that of a BatchNorm.
    """
    if needs_recalibration(record):
        raise CheckpointError(
            f"{source} {FROM_BATCH_NORM}: train from it before you evaluate or fold it, which "
            "recalibrates it first"
        )


def needs_recalibration(record: Mapping[str, Any] | None) -> bool:
    """Return whether a record says that `running_var` is still that of a BatchNorm."""
    return isinstance(record, Mapping) and bool(record.get("recalibrate"))


def record_of_config(checkpoint: Mapping[str, Any], train: bool = True) -> dict[str, Any] | None:
    """Return what the config in a checkpoint of `Trainer` says of its weights, as a record.

    Args:
        checkpoint: its entry "config" is the text of a YAML file.
        train: False for an evaluation, whose result depends on more keys.
    Returns:
        None if the checkpoint holds no config.
    """
    text = checkpoint.get(CONFIG)
    try:
        config = yaml.safe_load(text) if isinstance(text, str) else None
    except (yaml.YAMLError, RecursionError):  # the entry of another program
        config = None
    if config is None:
        return None
    keys = _OF_WEIGHTS if train else _OF_WEIGHTS + _OF_EVALUATION
    values = {key: _lists(get_key(config, key)) for key in keys}
    return {"config": {key: value for key, value in values.items() if value is not None}}


def differences(record: Mapping[str, Any] | None, cfg: Mapping[str, Any]) -> list[str]:
    """Return one line for each config key that has another value in `cfg` than in a checkpoint.

    Args:
        record: the checkpoint's entry "mabn_d2", whose "config" maps keys such as
            MODEL.RESNETS.STRIDE_IN_1X1 to values, or `record_of_config`; None if it has none.
    """
    lines = []
    config = (record or {}).get("config")
    for key, trained in config.items() if isinstance(config, dict) else ():
        value = _lists(get_key(cfg, key))
        if key == "MODEL.BACKBONE.NAME" and {value, trained} == SAME_WITH_MABN:
            continue
        if value is not None and value != _lists(trained):
            lines.append(f"{key} is {value}, the weights were trained with {trained}")
    return lines


def warn_of_differences(record: Mapping[str, Any] | None, cfg: CfgNode) -> None:
    """Log the `differences` as warnings."""
    for line in differences(record, cfg):
        logging.getLogger(__name__).warning(f"{line}: change the config unless this is meant")


def _lists(value: Any) -> Any:
    """Return a value with lists for its tuples, which YAML does not have."""
    return [_lists(v) for v in value] if isinstance(value, (list, tuple)) else value
