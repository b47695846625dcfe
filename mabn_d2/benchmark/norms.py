"""The norms that are timed, and what each is compared with."""

from collections.abc import Callable, Iterable
from functools import partial

from torch import nn

from ..layers import MABN2d, SplitBatchNorm2d
from ..layers.naive import NaiveMABN2d
from ..modeling import norm_table

DETECTORS = ("frozen_bn", "mabn", "mabn_folded", "mabn_folded_conv")
STEPS = ("micro", "accumulated", "at_once")


def layer_norms() -> dict[str, Callable[[int], nn.Module]]:
    """Return {name: function that makes the layer from the number of channels}."""
    return {
        "bn": nn.BatchNorm2d,
        "bn_relu": lambda channels: nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)),
        "syncbn": nn.SyncBatchNorm,  # in one process: its cost without communication
        "gn": lambda channels: nn.GroupNorm(min(32, channels), channels),
        "in": partial(nn.InstanceNorm2d, affine=True),
        "ln": partial(nn.GroupNorm, 1),  # over C, H, W
        **{name.lower(): row.layer for name, row in norm_table.NORMS.items()},
        "mabn_relu": partial(MABN2d, activation="relu"),
        "bn_split": partial(SplitBatchNorm2d, batch_size=2),
        "mabn_split": partial(MABN2d, split_batch=True),
        "formula": NaiveMABN2d,
    }


def detectron2_norms() -> dict[str, str]:
    """Return {name: name in Detectron2's configs} of the norms that a detector can have."""
    stock = {"bn": "BN", "syncbn": "SyncBN", "gn": "GN", "ln": "LN"}
    return stock | {name.lower(): name for name in norm_table.NORMS}


def known_norms(what: str) -> Iterable[str]:
    """Return the names that a benchmark knows."""
    known: dict[str, Iterable[str]] = {
        "layer": (*layer_norms(), "copy"),  # copy: Tensor.copy_ of one activation
        "inference": layer_norms(),
        "detector": DETECTORS,
        "step": detectron2_norms(),
        "accumulation": STEPS,
    }
    return known[what]


def baseline(norm: str, what: str, chosen: str | None = None) -> str:
    """Return the norm that a norm is compared with in a benchmark."""
    if chosen:
        return chosen
    if what in ("detector", "accumulation"):
        return next(iter(known_norms(what)))
    return "bn_relu" if norm.endswith("_relu") else "bn"


def choose_norms(
    names: str, known: Iterable[str], device: str, what: str, chosen: str | None = None
) -> list[str]:
    """Split "bn,mabn" and return the names, their baselines first.

    Args:
        names: comma-separated names.
        known: names that the benchmark has.
        device: "cpu" or "cuda".
        what: the benchmark, see `known_norms`.
        chosen: a baseline for all, instead of the usual ones.

    Raises:
        ValueError: if a norm is unknown or can't run on the device; it names those that can.
    """
    able = [name for name in known if name != "syncbn" or device == "cuda"]
    asked = names.split(",")
    result = list(dict.fromkeys([*(baseline(name, what, chosen) for name in asked), *asked]))
    for name in result:
        if name not in able:
            raise ValueError(f"norm {name!r} is not available on {device}: {', '.join(able)} are")
    return result
