"""ImageNet classifiers -> the backbone's weights in Detectron2."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names

from ..modeling.norm_table import parse_norm_options
from .io import CheckpointError
from .record import checkpoint_of, recorded
from .resnet import detectron2_name, expected_resnet, resnet_config
from .state import check, rename, to_mabn, unwrap

# What the weights of each source were trained with; it can't be seen in them.
# The published MABN classifier takes BGR levels of 0-255 as they are, and strides in the 3x3.
_PUBLISHED = {
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "INPUT.FORMAT": "BGR",
    "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
}
_TORCHVISION = {
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
}
_MSRA = {
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "INPUT.FORMAT": "BGR",
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
}
_CLASSIFIER = re.compile(r"(?:stem\.)?(?:fc|linear)\d*\.(?:weight|bias)")


def convert_imagenet(
    checkpoint: Any,
    stride_in_1x1: bool | None = None,
    channel_order: str | None = None,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    keep_buffers: bool = False,
    prefix: str = "backbone.bottom_up.",
) -> dict[str, Any]:
    """Convert a ResNet classifier to the backbone of a Detectron2 model with MABN.

    Sources: the published MABN classifier (R50-wc.pth and its like), torchvision's BatchNorm
    ResNets, Detectron2's BatchNorm ResNet backbones, and Caffe2's with BatchNorm that is not folded
    (R-50-2.pkl); depths 18 to 152, ResNeXt where the shapes say so.

    Args:
        checkpoint: a state dict, or what wraps one, of tensors or numpy arrays.
        stride_in_1x1, channel_order, pixel_mean, pixel_std: recorded as config keys; None is what
            the source's authors did, or what a checkpoint of this package's classifiers says.
            `channel_order` is "BGR" or "RGB"; the other two are 3 numbers in that order, of levels of
            0-255.
        keep_buffers: keep MABN's windows and counter, which start over otherwise.
        prefix: of the backbone in the model; "backbone." where there is no FPN.
    Returns:
        {"model": state dict, "__author__": ..., "mabn_d2": {"source", "config", "dropped",
        "recalibrate"}}, a checkpoint that DetectionCheckpointer loads. "recalibrate" is true if
        `running_var` is that of a BatchNorm behind filters that were not centred: a training that
        starts from the file computes it anew. Tensors are shared with the input.
    Raises:
        CheckpointError: listing entries that no rule knows, that are missing or don't fit.
    """
    state, beside = unwrap(checkpoint)
    caffe2 = "conv1_w" in state
    if caffe2:
        names = list(state)
        new_names = dict(zip(names, convert_basic_c2_names(names), strict=True))
        state = rename(state, new_names.get)
    for known in ("backbone.bottom_up.", "backbone."):
        if all(name.startswith(known) for name in state):
            state = {name.removeprefix(known): value for name, value in state.items()}
    classifier = [name for name in state if _CLASSIFIER.fullmatch(name)]
    for name in classifier:
        del state[name]
    detectron2 = any(name.startswith("res2.") for name in state)
    state = rename(state, detectron2_name)

    batch_norm = any(name.endswith(".running_mean") for name in state)
    if caffe2:
        source, trained = "Caffe2 ResNet with BatchNorm", _MSRA
    elif batch_norm and detectron2:
        # Detectron2's converter keeps torchvision's name in the file.
        from_torchvision = checkpoint.get("__author__") == "torchvision"
        source, trained = (
            "Detectron2 ResNet with BatchNorm",
            (_TORCHVISION if from_torchvision else _MSRA),
        )
    elif batch_norm:
        source, trained = "torchvision ResNet with BatchNorm", _TORCHVISION
    else:
        source, trained = "ResNet with MABN", _PUBLISHED
    own = checkpoint.get("args")  # of this package's tools/train_imagenet.py
    if isinstance(own, Mapping) and isinstance(own.get("bgr255"), bool):
        trained = (_PUBLISHED if own["bgr255"] else _TORCHVISION) | _of_norm(own)

    state, dropped, recalibrate = to_mabn(state, keep_buffers)
    config = resnet_config(state)
    state = check(state, expected_resnet(config))
    trained = recorded(trained, stride_in_1x1, channel_order, pixel_mean, pixel_std)
    if config["MODEL.RESNETS.DEPTH"] < 50:
        del trained["MODEL.RESNETS.STRIDE_IN_1X1"]  # basic blocks have no 1x1 to stride in
    dropped |= {"the classifier": classifier, "entries beside the weights": beside}
    state = {prefix + name: value for name, value in state.items()}
    return checkpoint_of(state, source, config | trained, dropped, recalibrate)


def _of_norm(args: Mapping[str, Any]) -> dict[str, float]:
    """Return the norm's settings that matter in evaluation, too, as config keys.

    Args:
        args: of `tools/train_imagenet.py`.
    Raises:
        CheckpointError: for a setting that no config has.
    """
    given = args.get("norm_option")
    try:
        options = parse_norm_options(given or [])
        if "activation" in options:
            raise ValueError("no ResNet of Detectron2 has an activation in each norm")
        return {"MODEL.MABN.EPS": float(options.get("eps", 1e-5))}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the classifier was trained with --norm-option {given}: {error}"
        ) from error
