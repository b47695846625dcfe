"""BatchNorm and Batch Renormalization of groups of images, see `functional_split.py`."""

from typing import Any

import torch

from .functional_split import group_mean, group_sizes, group_sum, to_images
from .ops.dispatch import select_backend
from .ops.memory_format import dense_like
from .ops.torch_passes import broadcast


def image_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and biased variance over H, W as (N, C) each, in float32 at least."""
    n, c, h, w = x.shape
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.is_contiguous():
        # GroupNorm of one channel a group: the fastest such kernel on CPU, but slow in channels-last.
        _, mean, inv_std = torch.native_group_norm(x, None, None, n, c, h * w, c, 0.0)
        return mean, inv_std.pow_(-2)
    mean = x.mean((2, 3))
    return mean, (x - broadcast(mean)).square_().mean((2, 3))


def group_moments(x: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and biased variance of each group over its N, H, W as (G, C) each."""
    image_mean, image_var = image_moments(x)
    mean = group_mean(image_mean, batch_size)
    between = (image_mean - to_images(mean, batch_size, len(x))).square()
    return mean, group_mean(image_var + between, batch_size)


class _NormalizeGroups(torch.autograd.Function):
    """y = weight * (r * z + d) + bias, z = (x - mean) / sqrt(var + eps); keeps x and vectors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        r: torch.Tensor,
        d: torch.Tensor,
        eps: float,
        batch_size: int,
    ) -> torch.Tensor:
        dtype = var.dtype
        inv_std = (var + eps).rsqrt()
        scale = weight.to(dtype) * r * inv_std
        shift = weight.to(dtype) * d + bias.to(dtype) - mean * scale
        ctx.save_for_backward(x, weight, bias, mean, inv_std, r, d, scale)
        ctx.batch_size = batch_size
        ctx.set_materialize_grads(False)
        vectors = to_images(torch.stack([scale, shift]), batch_size, len(x))
        return select_backend(x).affine(x, *vectors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return (None,) * 9
        x, weight, bias, mean, inv_std, r, d, scale = ctx.saved_tensors
        n, batch_size, backend = len(x), ctx.batch_size, select_backend(x)
        dy = dense_like(dy, x)
        dyx, dysum = (group_sum(rows, batch_size) for rows in backend.product_sums(dy, x, True))
        dyz = (dyx - mean * dysum) * inv_std
        dx = None
        if ctx.needs_input_grad[0]:
            # dx = (g - z * E[g z] - E[g]) / sqrt(var + eps), and z is affine in x.
            pixels = group_sizes(n, batch_size, dyz) * (x.shape[2] * x.shape[3])
            g_scale = weight.to(r.dtype) * r / pixels
            slope = dyz * g_scale * inv_std.square()
            shift = slope * mean - dysum * g_scale * inv_std
            vectors = to_images(torch.stack([scale, -slope, shift]), batch_size, n)
            dx = backend.combine(dy, x, *vectors)
        dweight = (dyz * r + dysum * d).sum(0).to(weight.dtype)
        return dx, dweight, dysum.sum(0).to(bias.dtype), *(None,) * 6


def normalize_groups(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    r: torch.Tensor,
    d: torch.Tensor,
    eps: float,
    batch_size: int,
) -> torch.Tensor:
    r"""Normalize each group of `batch_size` images by statistics of its own.

    .. math::
        z = (x - \mu) / \sqrt{v + \epsilon}, \quad y = w (r z + d) + b, \quad
        dx = (g - z E[g z] - E[g]) / \sqrt{v + \epsilon}, \quad g = dy\, w\, r

    This is BatchNorm if r = 1 and d = 0, and Batch Renormalization with its r and d.

    Args:
        x: (N, C, H, W), dense, not empty, any floating dtype.
        weight, bias: (C,).
        mean, var, r, d: (G, C), float32 at least; no gradient flows through r and d.
        eps: added to var.
        batch_size: images in a group.

    Returns:
        y, like x.
    """
    return _NormalizeGroups.apply(x, weight, bias, mean, var, r, d, eps, batch_size)
