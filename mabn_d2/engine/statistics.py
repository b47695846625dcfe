"""What the norms see while they train: batch statistics beside their moving averages."""

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import get_event_storage
from torch import nn

from ..layers import MABN2d


class Moving:
    """A statistic (C,): its last value, its mean over `window` iterations, its EMA."""

    def __init__(self, window, momentum):
        self.window, self.momentum, self.values, self.count = window, momentum, None, 0

    def push(self, value):
        if self.values is None:
            self.values, self.ema = value.new_zeros(self.window, *value.shape), value.clone()
        self.values[self.count % self.window] = value
        self.ema.lerp_(value, 1 - self.momentum)
        self.batch = value
        self.count += 1

    def means(self):
        """Return {"batch", "window", "ema"}, each averaged over the channels, one host transfer."""
        window = self.values[: min(self.count, self.window)].mean(0)
        numbers = torch.stack([self.batch.mean(), window.mean(), self.ema.mean()]).tolist()
        return dict(zip(("batch", "window", "ema"), numbers))


class LogStatistics(HookBase):
    r"""Writes the statistics of some norms to the event storage every `period` iterations.

    Scalars `statistics/{layer}/{statistic}/{batch,window,ema}`, means over the channels. With z the
    normalized input, w the weight and g = dy w (times r in MABN), the statistics are

    - of MABN: `x2` = E[x^2] and `psi` = E[g z], the two it has; `r` (batch only) and `r_clipped`,
      the share of channels whose r is at a bound;
    - of BatchNorm: `mean`, `var`, `g` = E[g] and `psi` = E[g z], the four of the paper's section 3.

    `window` and `ema` are what MABN would use, for BatchNorm too, which uses `batch`. Watched layers
    compute them in every iteration; a host synchronization happens when they are written only.

    Args:
        layers: names of modules; empty: the first, the middle and the last norm.
        window, momentum: m and a of MABN2d.
        grad_scaler: what the loss is scaled by, if it is.
    Raises:
        ValueError: for a name that is no MABN or BatchNorm layer of the model.
    """

    def __init__(self, model, period, layers=(), window=16, momentum=0.98, grad_scaler=None):
        norms = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (MABN2d, nn.modules.batchnorm._BatchNorm))
        }
        wrong = [name for name in layers if name not in norms]
        if wrong or not norms:
            raise ValueError(
                f"no MABN or BatchNorm layer to watch is named {wrong[0] if wrong else '...'!r}; "
                f"there are {', '.join(norms) or 'none: switch the logging off'}"
            )
        names = list(norms)
        names = layers or [names[i] for i in sorted({0, len(names) // 2, len(names) - 1})]
        self.layers = {name: norms[name] for name in names}
        self.period, self.window, self.momentum = period, window, momentum
        self.grad_scaler = grad_scaler

    def before_train(self):
        self.moving = {name: {} for name in self.layers}
        self.clipping = {}
        self.handles = [
            layer.register_forward_hook(self._watch(name)) for name, layer in self.layers.items()
        ]

    def after_train(self):
        for handle in self.handles:
            handle.remove()

    def after_step(self):
        if (self.trainer.iter + 1) % self.period:
            return
        scale = self.grad_scaler.get_scale() if self.grad_scaler else 1.0
        for name, statistics in self.moving.items():
            for statistic, moving in statistics.items():
                by = scale if statistic in ("g", "psi") else 1.0
                for kind, value in moving.means().items():
                    self._put(f"{name}/{statistic}/{kind}", value / by)
        for name, (r, limit) in self.clipping.items():
            clipped = (r <= 1 / limit) | (r >= limit)
            mean, share = torch.stack([r.mean(), clipped.float().mean()]).tolist()
            self._put(f"{name}/r/batch", mean)
            self._put(f"{name}/r_clipped/batch", share)

    def _put(self, name, value):
        get_event_storage().put_scalar(f"statistics/{name}", value, smoothing_hint=False)

    def _watch(self, name):
        def push(statistic, value):
            moving = self.moving[name].setdefault(statistic, Moving(self.window, self.momentum))
            moving.push(value.float())

        def hook(layer, args, y):
            x = args[0].detach()
            if not y.requires_grad or not layer.training or x.numel() == 0:
                return
            axes, wide = (0, 2, 3), x.float()
            if isinstance(layer, MABN2d):
                if layer.last is None:  # frozen
                    return
                var, r = layer.last.var, layer.last.r
                mean, scale = torch.zeros_like(var), layer.weight.detach() * r
                push("x2", wide.square().mean(axes))
                self.clipping[name] = r, layer.clip_limit
            else:
                var, mean = torch.var_mean(wide, axes, correction=0)
                scale = 1.0 if layer.weight is None else layer.weight.detach()
                push("mean", mean)
                push("var", var)

            def backward(dy):
                if getattr(layer, "activation", None):
                    dy = dy * (y.detach() > 0)
                z = (x - mean[:, None, None]) * (var + layer.eps).rsqrt()[:, None, None]
                if not isinstance(layer, MABN2d):
                    push("g", dy.float().mean(axes) * scale)
                push("psi", (dy * z).mean(axes) * scale)

            y.register_hook(backward)

        return hook
