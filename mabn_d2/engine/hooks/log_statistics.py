"""What the norms see while they train: batch statistics beside their moving averages."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import get_event_storage
from torch import nn

from ...layers import MABN2d, functional
from ...layers.mabn import Statistics
from ...modeling.norm_table import NORMS, norm_layers


class Moving:
    """A statistic (C,): its last value, its mean over `window` iterations, its EMA.

    A value that is not finite enters neither average, which is decided on the device.
    """

    def __init__(self, window: int, momentum: float) -> None:
        self.window, self.momentum = window, momentum
        self.batch: torch.Tensor | None = None

    def push(self, value: torch.Tensor) -> None:
        """Enter the value (C,) of this iteration."""
        if self.batch is None:
            self.values, self.ema = (
                value.new_zeros(self.window, len(value)),
                torch.zeros_like(value),
            )
            self.count = torch.zeros(1, dtype=torch.int64, device=value.device)
        accepted = functional.is_finite(value)
        functional.push(self.values, self.count % self.window, value, accepted)
        target = torch.where(accepted, value, self.ema)
        moved = self.ema.lerp(target, 1 - self.momentum)
        self.ema = torch.where(self.count == 0, target, moved)
        self.count += accepted
        self.batch = value

    def means(self) -> dict[str, torch.Tensor]:
        """Return {"batch", "window", "ema"}, each averaged over the channels, on the device.

        Empty before the first value.
        """
        if self.batch is None:
            return {}
        window = window_mean(self.values, self.count)
        return {"batch": self.batch.mean(), "window": window, "ema": self.ema.mean()}


def window_mean(values: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Return the mean of a window (m, C) of which `count` (1,) rows, at most m, have been written."""
    return (values.sum(0) / count.clamp(1, len(values))).mean()


def forward_order(name: str) -> tuple[bool, bool]:
    """A sort key that brings names of layers nearer to the order in which the forward uses them.

    Detectron2 registers an FPN's own layers before those of the network below it, and a sorted file
    has "res2" before "stem".
    """
    parts = name.split(".")
    return "bottom_up" not in parts, "stem" not in parts


def norms_to_watch(model: nn.Module, layers: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Return {name: layer} of the norms that `layers` names; by default the first, middle and last.

    Raises:
        ValueError: for a name that is not a BatchNorm layer, or one of `NORMS`, in the model, or if the
            model has none.
    """
    kinds: tuple[type[nn.Module], ...] = (*norm_layers(), nn.modules.batchnorm._BatchNorm)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if not norms:
        raise ValueError(f"the model has no {', '.join(NORMS)} or BatchNorm layer to watch")
    for name in layers:
        if name not in norms:
            close = get_close_matches(name, norms, n=1, cutoff=0)[0]
            raise ValueError(
                f"no {', '.join(NORMS)} or BatchNorm layer to watch is named {name!r}; there are "
                f"{', '.join(norms)}: did you mean {close}?"
            )
    names = sorted(norms, key=forward_order)
    names = list(layers) or [names[i] for i in sorted({0, len(names) // 2, len(names) - 1})]
    return {name: norms[name] for name in names}


class LogStatistics(HookBase):
    r"""Writes the statistics of some norms to the event storage every `period` iterations.

    Scalars `statistics/{layer}/{statistic}/{batch,window,ema}`, means over the channels. With z the
    normalized input, w the weight and g = dy w (times r in MABN), the statistics are

    - of MABN: `x2` = E[x^2] and `psi` = E[g z], the two it has. `window` is the mean of the layer's own
      window (SMAS), which the layer uses from its warm-up on, and `ema` of x2 its running_var (EMAS).
      It has no EMA of psi; the one written is this hook's, to compare. `r` by the statistic it is
      computed from: `window`, the layer's, and `batch`, sqrt(x2 + eps) / sqrt(running_var + eps) without
      a bound. `r_clipped/window` is the share of channels whose r is at its bound;
    - of BatchNorm and other norms: `mean`, `var`, `g` = E[g] and `psi` = E[g z], the four of the paper's section 3. It
      uses `batch`; `window` and `ema` are this hook's: what MABN's averages of them would be. (Of
      SyncBatchNorm they are those of one rank.)

    Watched layers compute them in every iteration; a host synchronization happens when they are
    written only. Statistics of scaled gradients are divided by the scale of their iteration.

    Args:
        layers: names of modules; empty: the first, the middle and the last norm.
        window, momentum: m and a of the averages over BatchNorm's statistics.
        grad_scaler: what the loss is scaled by, if it is.
    Raises:
        ValueError: as `norms_to_watch`.
    """

    def __init__(
        self,
        model: nn.Module,
        period: int,
        layers: Sequence[str] = (),
        window: int = 16,
        momentum: float = 0.98,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.layers = norms_to_watch(model, layers)
        self.period, self.window, self.momentum = period, window, momentum
        self.grad_scaler = grad_scaler

    def before_train(self) -> None:
        self.moving: dict[str, dict[str, Moving]] = {name: {} for name in self.layers}
        self.handles = [
            layer.register_forward_hook(self._watch(name)) for name, layer in self.layers.items()
        ]

    def after_train(self) -> None:
        for handle in self.handles:
            handle.remove()

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period:
            return
        scalars: dict[str, torch.Tensor] = {}
        for name, layer in self.layers.items():
            for statistic, moving in self.moving[name].items():
                means = moving.means().items()
                scalars |= {f"{name}/{statistic}/{kind}": mean for kind, mean in means}
            if isinstance(layer, MABN2d) and (last := layer.last) is not None:
                scalars |= {f"{name}/{key}": mean for key, mean in self._own(layer, last).items()}
        values = (
            torch.stack([mean.float() for mean in scalars.values()]).tolist() if scalars else []
        )
        for name, value in zip(scalars, values, strict=True):
            get_event_storage().put_scalar(f"statistics/{name}", value, smoothing_hint=False)

    def _own(self, layer: MABN2d, last: Statistics) -> dict[str, torch.Tensor]:
        """Return what a MABN layer itself keeps, {statistic/kind: mean over the channels}."""
        x2, r, limit = last.x2, last.r, layer.clip_limit
        return {
            "x2/batch": x2.mean(),
            "x2/window": window_mean(layer.buffer_x2, layer.iters),
            "x2/ema": layer.running_var.mean(),
            "psi/window": window_mean(layer.buffer_gz, layer.iters) / self._scale(x2.device),
            "r/batch": ((x2 + layer.eps) / (layer.running_var + layer.eps)).sqrt().mean(),
            "r/window": r.mean(),
            "r_clipped/window": ((r <= 1 / limit) | (r >= limit)).float().mean(),
        }

    def _scale(self, device: torch.device) -> torch.Tensor:
        """Return what gradients are scaled by now, on the device."""
        one = torch.ones((), device=device)
        return one if self.grad_scaler is None else self.grad_scaler.scale(one)

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], None]:
        def push(statistic: str, value: torch.Tensor) -> None:
            moving = self.moving[name].setdefault(statistic, Moving(self.window, self.momentum))
            moving.push(value.float())

        def hook(layer: nn.Module, args: tuple[Any, ...], y: torch.Tensor) -> None:
            x = args[0].detach()
            if not y.requires_grad or not layer.training or x.numel() == 0:
                return
            axes = (0, 2, 3)
            scale: torch.Tensor | float
            if isinstance(layer, MABN2d):
                last = layer.last  # computed from the layer's records at each use
                if last is None:  # frozen
                    return
                var = last.var
                mean, scale = torch.zeros_like(var), layer.weight.detach() * last.r
            else:
                var, mean = torch.var_mean(x.float(), axes, correction=0)
                weight = layer._parameters.get("weight")  # None with affine=False
                scale = 1.0 if weight is None else weight.detach()
                push("mean", mean)
                push("var", var)

            def backward(dy: torch.Tensor) -> None:
                dy = dy.float()
                if getattr(layer, "activation", None):
                    dy = dy * (y.detach() > 0)
                z = (x - mean[:, None, None]) * (var + getattr(layer, "eps", 0.0)).rsqrt()[
                    :, None, None
                ]
                unscaled = scale / self._scale(dy.device)
                if not isinstance(layer, MABN2d):
                    push("g", dy.mean(axes) * unscaled)
                push("psi", (dy * z).mean(axes) * unscaled)

            y.register_hook(backward)

        return hook
