"""Classifiers with a norm of one's choice: torchvision's ResNets, and a small one for small images."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torchvision
from torch import nn

from ..layers import SplitBatchNorm2d
from ..modeling.norm import check_paired, new_norm
from ..modeling.norm_table import NORMS

ARCHS = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnet152": "resnet152",
    "resnext50": "resnext50_32x4d",
}


# The norms that do not divide an input into normalization batches, and what they do instead.
WITHOUT_NORM_BATCH = {
    "gn": "GN (normalizes each image alone)",
    "syncbn": "SyncBN (normalizes all images together)",
}


def norm_names() -> list[str]:
    """Return the norms that a classifier can have: three of torch's, and all of the norm table."""
    return sorted({"bn", "gn", "syncbn", *(name.lower() for name in NORMS)})


class SmallNet(nn.Sequential):
    """Nine 3x3 convolutions of 16, 32 and 64 channels, each three starting with stride 2."""

    def __init__(self, num_classes: int, norm_layer: Callable[[int], nn.Module]) -> None:
        layers, before = [], 3
        for channels in (16, 32, 64):
            for stride in (2, 1, 1):
                conv = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                layers += [conv, norm_layer(channels), nn.ReLU(inplace=True)]
                before = channels
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes)]
        super().__init__(*layers, *pool)


def build_classifier(
    arch: str, norm: str, norm_batch: int, simulated_batch: int, num_classes: int, **settings: Any
) -> nn.Module:
    """Return a classifier of (N, 3, H, W) whose norm has batches of `norm_batch` images.

    Args:
        arch: a key of ARCHS, with the parameter names of torchvision, or "small".
        norm: "bn", "brn", "mabn" (all convolutions centred) split an input into normalization
            batches; "gn", 32 groups or as many as divide the channels, and "syncbn" know none.
        simulated_batch: images that MABN's windows span.
        settings: further arguments of MABN2d or BatchRenorm2d.

    Raises:
        ValueError: for a value out of range.
        TypeError: for a setting that the norm does not have.
    """
    if arch not in (*ARCHS, "small"):
        raise ValueError(f"unknown arch {arch!r}: use one of {', '.join(ARCHS)}, small")
    if norm not in norm_names():
        raise ValueError(f"unknown norm {norm!r}: use one of {', '.join(norm_names())}")
    if norm_batch < 1:
        raise ValueError(f"the normalization batch must be positive, got {norm_batch}")
    row = NORMS.get(norm.upper())
    if settings and row is None:
        raise TypeError(f"norm {norm!r} takes no settings, got {', '.join(settings)}")
    if row is not None:
        if row.split_layer is not None:
            settings["batch_size"] = norm_batch
        if row.has_window:
            settings["simulated_batch_size"] = simulated_batch
        split = row.split_layer is not None
        norm_layer: Callable[[int], nn.Module] = partial(
            new_norm, norm.upper(), split=split, **settings
        )
    else:
        layers: dict[str, Callable[[int], nn.Module]] = {
            "bn": partial(SplitBatchNorm2d, batch_size=norm_batch),
            "gn": lambda channels: nn.GroupNorm(min(32, channels // 4), channels),
            "syncbn": nn.BatchNorm2d,
        }
        norm_layer = layers[norm]
    if arch == "small":
        model = SmallNet(num_classes, norm_layer)
    else:
        model = torchvision.models.get_model(
            ARCHS[arch], weights=None, num_classes=num_classes, norm_layer=norm_layer
        )
    check_paired(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if norm == "syncbn" else model
