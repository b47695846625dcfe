r"""Normalization batches smaller than the batch ("ghost" batches): the classification form.

An input of N images is cut into G = ceil(N / B) consecutive groups of B images, the last one of what
is left; each is a normalization batch. Per-group statistics are (G, C), an iteration's in the order
of its images; a short last group counts like any other wherever groups are averaged.

There is no loop over groups. The passes over activations give or take one number per image and
channel, and groups are averages over images, (N, C) numbers. Compiled operators and Triton's take such
rows as they are, and the former do all of a layer in one call (`ops/dispatch.py`). In torch's own kernels
contiguous (N, C, H, W) is looked at as (1, N * C, H, W), so that the batch-norm kernels of `torch_ops.py`
serve; in channels-last that is no view, and elementwise kernels take their place.
"""

import torch

from .functional import is_finite, renorm
from .ops import torch_ops
from .ops.dispatch import find


def group_sizes(n, batch_size, like):
    """Return the images of each of n images' groups, to divide (G, C) by: a number, or (G, 1)."""
    if n % batch_size == 0:
        return batch_size
    sizes = like.new_full((-(-n // batch_size), 1), batch_size)
    sizes[-1] = n % batch_size
    return sizes


def group_sum(rows, batch_size):
    """(N, C), one row an image -> (G, C): the sum over each group of `batch_size` images."""
    n, c = rows.shape
    if n % batch_size:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -n % batch_size))
    return rows.view(-1, batch_size, c).sum(1)


def group_mean(rows, batch_size):
    """(N, C), one row an image -> (G, C): the mean over each group of `batch_size` images."""
    return group_sum(rows, batch_size) / group_sizes(len(rows), batch_size, rows)


def to_images(groups, batch_size, n):
    """(..., G, C) -> (..., n, C): each image's row is that of its group."""
    return groups.repeat_interleave(batch_size, -2)[..., :n, :]


def _fold(x):
    n, c, h, w = x.shape
    return x.reshape(1, n * c, h, w)


def image_moments(x):
    """Return mean and biased variance over H, W as (N, C) each, in float32 at least."""
    n, c, h, w = x.shape
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.is_contiguous():
        # GroupNorm of one channel a group: the fastest such kernel on CPU, but slow in channels-last.
        _, mean, inv_std = torch.native_group_norm(x, None, None, n, c, h * w, c, 0.0)
        return mean, inv_std.pow_(-2)
    mean = x.mean((2, 3))
    return mean, (x - torch_ops.maps(mean)).square_().mean((2, 3))


def group_moments(x, batch_size):
    """Return mean and biased variance of each group over its N, H, W as (G, C) each."""
    image_mean, image_var = image_moments(x)
    mean = group_mean(image_mean, batch_size)
    between = (image_mean - to_images(mean, batch_size, len(x))).square()
    return mean, group_mean(image_var + between, batch_size)


def group_mean_square(x, batch_size):
    """Return mean(x^2) of each group over its N, H, W as (G, C)."""
    if x.is_contiguous() or find(x):
        sums = image_sums(x, x)[0]
    else:
        sums = x.square().sum((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
    return group_mean(sums / (x.shape[2] * x.shape[3]), batch_size)


def image_sums(dy, x, scratch=None):
    """Return sum(dy * x) and sum(dy) over H, W as (N, C) each, in float32 at least.

    `scratch`, like x, may be written to.
    """
    if operators := find(x):
        return operators.product_sums(dy, x, True)
    n, c = x.shape[:2]
    if x.is_contiguous():
        return tuple(sums.view(n, c) for sums in torch_ops.product_sums(_fold(dy), _fold(x)))
    dtype = torch.promote_types(x.dtype, torch.float32)
    product = torch.mul(dy, x, out=scratch)
    return product.sum((2, 3), dtype=dtype), dy.sum((2, 3), dtype=dtype)


def affine(x, scale, shift, out=None):
    """Return scale * x + shift, per image and channel (N, C), in the dtype and format of x.

    The result is `out`, which is like x, or a new tensor.
    """
    if operators := find(x):
        return operators.affine(x, scale, shift)
    if x.is_contiguous():
        y = torch_ops.scale_shift(_fold(x), scale.flatten(), shift.flatten())
        # Nothing else holds y, and an in-place ReLU on a view from a custom function is an error.
        return torch.ops.aten._unsafe_view(y, x.shape)
    out = torch.empty_like(x) if out is None else out
    return torch.addcmul(torch_ops.maps(shift), x, torch_ops.maps(scale), out=out)


def push_groups(window, rows, first, accepted):
    """Let this iteration's groups enter the window, in place; return each one's trailing mean.

    Args:
        window: (m, C) statistics of the last m groups before this iteration, the oldest first.
        rows: (G, C) this iteration's.
        first: (1,) bool, True at iteration 1: nothing has entered the window yet. Then each group
            keeps its own statistic, and if G < m the groups are repeated until the window is full.
        accepted: (1,) bool; where False the window stays.

    Returns:
        (G, C), the means over the m groups that end with each.
    """
    m, groups = len(window), len(rows)
    sequence = torch.cat([window.to(rows.dtype), rows])
    means = sequence.unfold(0, m, 1).mean(-1)[1:]
    full = rows.repeat(-(-m // groups), 1)[-m:] if groups < m else rows[-m:]
    entered = torch.where(first, full, sequence[-m:]).to(window.dtype)
    window.copy_(torch.where(accepted, entered, window))
    return torch.where(first, rows, means)


def advance_groups(
    x2: torch.Tensor,
    accepted: torch.Tensor,
    buffer_x2: torch.Tensor,
    running_var: torch.Tensor,
    iters: torch.Tensor,
    eps: float,
    momentum: float,
    warmup_iters: int,
    clip_limit: float,
    counts: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`functional.advance` for the x2 (G, C) of an iteration's groups.

    Returns:
        var (G, C), r (G, C), the iteration (1,) and first (1,) bool, True at iteration 1.
    """
    first = iters == 0
    var = push_groups(buffer_x2 if counts else buffer_x2.clone(), x2, first, accepted)
    mean = var.mean(0).to(running_var.dtype)
    before = torch.where(first, mean, running_var)
    r = renorm(var, before.to(var.dtype), eps, clip_limit)
    r = torch.where(iters + 1 < warmup_iters, 1.0, r)
    if counts:
        running_var.copy_(torch.where(accepted, before.lerp(mean, 1 - momentum), running_var))
        iters.add_(accepted)
    return var, r, iters.clone(), first


# An operator of its own for torch.compile, for the reason given at `functional.advance_op`.
advance_groups_op = torch.library.custom_op(
    "mabn_d2::advance_groups",
    advance_groups,
    mutates_args=("buffer_x2", "running_var", "iters"),
)


@advance_groups_op.register_fake
def _(x2, accepted, buffer_x2, running_var, iters, *arguments):
    t = torch.empty_like(iters)
    return torch.empty_like(x2), torch.empty_like(x2), t, torch.empty_like(accepted)


def combine(dy, x, scale_dy, scale_x, shift, out=None):
    """Return scale_dy * dy + scale_x * x + shift, per image and channel, else as `affine`."""
    if operators := find(x):
        return operators.combine(dy, x, scale_dy, scale_x, shift)
    return affine(x, scale_x, shift, out).addcmul_(dy, torch_ops.maps(scale_dy.to(x.dtype)))


class _NormalizeGroups(torch.autograd.Function):
    """y = weight * (r * z + d) + bias, z = (x - mean) / sqrt(var + eps); keeps x and vectors."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, r, d, eps, batch_size, psi_window, first):
        dtype = var.dtype
        inv_std = (var + eps).rsqrt()
        scale = weight.to(dtype) * r * inv_std
        shift = weight.to(dtype) * d + bias.to(dtype) - mean * scale
        ctx.save_for_backward(x, weight, bias, mean, inv_std, r, d, scale, first)
        # Written to in the backward, which the checks of save_for_backward forbid.
        ctx.psi_window, ctx.batch_size = psi_window, batch_size
        return affine(x, *to_images(torch.stack([scale, shift]), batch_size, len(x)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, bias, mean, inv_std, r, d, scale, first = ctx.saved_tensors
        n, batch_size = len(x), ctx.batch_size
        dy = torch_ops.dense_like(dy, x)
        # In channels-last first holds dy * x.
        dx = None
        if ctx.needs_input_grad[0] and not (x.is_contiguous() or find(x)):
            dx = torch.empty_like(x)
        dyx, dysum = (group_sum(rows, batch_size) for rows in image_sums(dy, x, dx))
        dyz = (dyx - mean * dysum) * inv_std

        pixels = group_sizes(n, batch_size, dyz) * (x.shape[2] * x.shape[3])
        g_scale = weight.to(r.dtype) * r / pixels
        psi = dyz * g_scale  # E[g z], g = dy * weight * r
        gamma = dysum * g_scale  # E[g]
        if ctx.psi_window is not None:
            psi = push_groups(ctx.psi_window, psi, first, is_finite(psi.flatten()))
            gamma = torch.zeros_like(gamma)

        if ctx.needs_input_grad[0]:
            # dx = (g - z * psi - gamma) / sqrt(var + eps), and z is affine in x.
            slope = psi * inv_std.square()
            vectors = torch.stack([scale, -slope, slope * mean - gamma * inv_std])
            dx = combine(dy, x, *to_images(vectors, batch_size, n), dx)
        dweight = (dyz * r + dysum * d).sum(0).to(weight.dtype)
        return dx, dweight, dysum.sum(0).to(bias.dtype), *(None,) * 8


def normalize_groups(
    x, weight, bias, mean, var, r, d, eps, batch_size, psi_window=None, first=None
):
    r"""Normalize each group of `batch_size` images by statistics of its own.

    .. math::
        z = (x - \mu) / \sqrt{v + \epsilon}, \quad y = w (r z + d) + b, \quad
        dx = (g - z E[g z] - E[g]) / \sqrt{v + \epsilon}, \quad g = dy\, w\, r

    which is BatchNorm where r = 1 and d = 0, and Batch Renormalization with its r and d. With
    `psi_window` it is MABN: there E[g z] is the mean over the last m groups, and the term E[g],
    which comes from subtracting a mean, is left out; mean and d are zeros.

    Args:
        x: (N, C, H, W), dense, not empty, any floating dtype.
        weight, bias: (C,).
        mean, var, r, d: (G, C), float32 at least; no gradient flows through r and d.
        psi_window: (m, C), moved by the backward unless E[g z] is not finite.
        first: (1,) bool, what `advance_groups` returned; with psi_window only.
    """
    return _NormalizeGroups.apply(
        x, weight, bias, mean, var, r, d, eps, batch_size, psi_window, first
    )
