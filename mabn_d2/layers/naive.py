"""The plain formula of MABN: what tests compare with, and benchmarks measure against.

It is written to be read beside Algorithm 1 of the paper: tensor expressions, one after the other, a
window that is indexed, conditions on a number. Nothing is fused, and nothing saves memory or passes.
"""

from typing import Any, NamedTuple

import torch
from torch import nn


class Forward(NamedTuple):
    """What the backward of one forward needs."""

    t: int  # the iteration
    v: torch.Tensor  # (C,) what x^2 was normalized by
    r: torch.Tensor  # (C,)
    z: torch.Tensor  # (N, C, H, W) x / sqrt(v + eps)
    positive: torch.Tensor | None  # (N, C, H, W) bool, where the ReLU lets dy through


class NaiveMABN2d(nn.Module):
    """MABN2d by its formulas, of one forward and its backward after the other.

    Args:
        num_features: C.
        window: m, the iterations that the windows span.
        eps, momentum, warmup_iters, clip_start, clip_limit: see MABN2d.
        relu: whether y is behind a ReLU.
        dtype: of parameters and statistics.
    """

    running_var: torch.Tensor
    window_x2: torch.Tensor
    window_gz: torch.Tensor

    def __init__(
        self,
        num_features: int,
        window: int = 16,
        eps: float = 1e-5,
        momentum: float = 0.98,
        warmup_iters: int = 100,
        clip_start: int = 1000,
        clip_limit: float = 5.0,
        relu: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, dtype=dtype))
        self.register_buffer("window_x2", torch.zeros(window, num_features, dtype=dtype))
        self.register_buffer("window_gz", torch.zeros(window, num_features, dtype=dtype))
        self.t, self.eps, self.momentum, self.relu = 0, eps, momentum, relu
        self.warmup_iters, self.clip_start, self.clip_limit = warmup_iters, clip_start, clip_limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x (N, C, H, W) in training; the result has the paper's gradient."""
        return _Normalize.apply(x, self.weight, self.bias, self)

    def normalize(self, x: torch.Tensor) -> tuple[torch.Tensor, Forward]:
        """Return y, and what `gradients` needs; the state moves."""
        self.t += 1
        t, m = self.t, len(self.window_x2)
        x2 = (x * x).mean((0, 2, 3)).to(self.running_var.dtype)
        self.window_x2[t % m] = x2
        v = self.window_x2.mean(0) if self._uses_windows(t) else x2
        r = torch.ones_like(v)
        if t > max(self.clip_start, self.warmup_iters):
            r = ((v + self.eps) / (self.running_var + self.eps)).sqrt()
            r = r.clamp(1 / self.clip_limit, self.clip_limit)
        self.running_var = self.momentum * self.running_var + (1 - self.momentum) * v
        z = x / _per_channel(v + self.eps, x).sqrt()
        y = z * _per_channel(self.weight * r, x) + _per_channel(self.bias, x)
        positive = y > 0 if self.relu else None
        return y.relu() if self.relu else y, Forward(t, v, r, z, positive)

    def gradients(
        self, kept: Forward, dy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return dx, dweight and dbias of the forward that `kept` is from; the window moves."""
        t, v, r, z, positive = kept
        if positive is not None:
            dy = dy * positive
        g = dy * _per_channel(self.weight * r, dy)
        psi = (g * z).mean((0, 2, 3)).to(self.running_var.dtype)
        self.window_gz[t % len(self.window_gz)] = psi
        if self._uses_windows(t):
            psi = self.window_gz.mean(0)
        dx = (g - z * _per_channel(psi, z)) / _per_channel(v + self.eps, z).sqrt()
        return dx, (dy * z).sum((0, 2, 3)) * r, dy.sum((0, 2, 3))

    def _uses_windows(self, t: int) -> bool:
        return t > len(self.window_x2) and t >= self.warmup_iters


def _per_channel(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return vector.to(like.dtype)[:, None, None]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, layer: NaiveMABN2d
    ) -> torch.Tensor:
        y, kept = layer.normalize(x)
        ctx.layer, ctx.t = layer, kept.t
        ctx.save_for_backward(*kept[1:])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept = Forward(ctx.t, *ctx.saved_tensors)
        dx, dweight, dbias = ctx.layer.gradients(kept, dy)
        dtype = ctx.layer.weight.dtype
        return dx, dweight.to(dtype), dbias.to(dtype), None
