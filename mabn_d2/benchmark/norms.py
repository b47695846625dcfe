"""The norms that are timed, and what each is compared with."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from ..layers import MABN2d, SplitBatchNorm2d
from ..modeling import norm_table


class FormulaMABN2d(nn.Module):
    """MABN2d as the paper writes it: tensor expressions and autograd, for comparison."""

    class Normalize(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, std, window, slot, plain):
            z = x / std
            ctx.save_for_backward(z, std)
            ctx.window, ctx.slot, ctx.plain = window, slot, plain
            return z

        @staticmethod
        def backward(ctx, g):
            z, std = ctx.saved_tensors
            ctx.window[ctx.slot] = psi = (g * z).mean((0, 2, 3))
            psi = psi if ctx.plain else ctx.window.mean(0)
            return (g - z * psi[:, None, None]) / std, None, None, None, None

    def __init__(self, channels, window=16, warmup_iters=100, clip_start=1000):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(f(channels)) for f in (torch.ones, torch.zeros))
        self.running_var = torch.ones(channels)
        self.windows = torch.zeros(2, window, channels)
        self.t, self.warmup, self.clip_start = 0, warmup_iters, clip_start

    def forward(self, x):
        self.t += 1
        slot, window = self.t % self.windows.shape[1], self.windows
        plain = self.t <= window.shape[1] or self.t < self.warmup
        with torch.no_grad():
            window[0, slot] = var = (x * x).mean((0, 2, 3))
            var = var if plain else window[0].mean(0)
            std = (var + 1e-5).sqrt().to(x.dtype)[:, None, None]
            r = torch.ones_like(var)
            if self.t > max(self.clip_start, self.warmup):
                r = ((var + 1e-5) / (self.running_var + 1e-5)).sqrt().clamp(1 / 5, 5)
            self.running_var = 0.98 * self.running_var + 0.02 * var
        z = self.Normalize.apply(x, std, window[1], slot, plain)
        scale = (self.weight * r).to(x.dtype)[:, None, None]
        return z * scale + self.bias.to(x.dtype)[:, None, None]


DETECTORS = ("frozen_bn", "mabn", "mabn_folded", "mabn_folded_conv")


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
        "formula": FormulaMABN2d,
    }


def detectron2_norms() -> dict[str, str]:
    """Return {name: name in Detectron2's configs} of the norms that a detector can have."""
    stock = {"bn": "BN", "syncbn": "SyncBN", "gn": "GN", "ln": "LN"}
    return stock | {name.lower(): name for name in norm_table.NORMS}


def known_norms(what: str) -> Iterable[str]:
    """Return the names that a benchmark knows."""
    if what == "detector":
        return DETECTORS
    if what == "step":
        return detectron2_norms()
    # copy: Tensor.copy_ of one activation
    return (*layer_norms(), "copy") if what == "layer" else layer_norms()


def baseline(norm: str, what: str, chosen: str | None = None) -> str:
    """Return the norm that a norm is compared with in a benchmark."""
    if chosen:
        return chosen
    if what == "detector":
        return "frozen_bn"
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
