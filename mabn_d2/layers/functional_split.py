r"""Normalization batches smaller than the batch ("ghost" batches): the classification form.

An input of N images is cut into G = ceil(N / B) consecutive groups of B images; the last group has
what is left. Each group is a normalization batch. Statistics of groups are (G, C), in the order of the
images. A short last group counts like any other wherever groups are averaged.

There is no loop over groups. The passes over activations take or give one number per image and
channel, and groups are sums over images, that is over (N, C) numbers.
"""

from typing import Any

import torch

from .functional import compiled_op, is_finite, renorm, scales
from .ops import torch_passes
from .ops.memory_format import dense_like
from .ops.second_backward import refuse_second_backward


def group_sizes(n: int, batch_size: int, like: torch.Tensor) -> int | torch.Tensor:
    """Return the number of images in each group of n images, to divide (G, C) by.

    Args:
        n: number of images.
        batch_size: images in a group.
        like: a tensor of the dtype and device of the result.

    Returns:
        A number if all groups are equal, else (G, 1).
    """
    if n % batch_size == 0:
        return batch_size
    sizes = like.new_full((-(-n // batch_size), 1), batch_size)
    sizes[-1] = n % batch_size
    return sizes


def group_sum(rows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Return the sum over each group of `batch_size` images: (N, C) -> (G, C)."""
    n, c = rows.shape
    if n % batch_size:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, (batch_size - n % batch_size) % batch_size))
    return rows.view(-1, batch_size, c).sum(1)


def group_mean(rows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Return the mean over each group of `batch_size` images: (N, C) -> (G, C)."""
    return group_sum(rows, batch_size) / group_sizes(len(rows), batch_size, rows)


def to_images(groups: torch.Tensor, batch_size: int, n: int) -> torch.Tensor:
    """Repeat the row of each group for its images: (..., G, C) -> (..., n, C)."""
    return groups.repeat_interleave(batch_size, -2)[..., :n, :]


def mean_square(passes: Any, x: torch.Tensor, batch_size: int = 0) -> torch.Tensor:
    """Return mean(x^2) over N, H, W as (C,), or of each group of images as (G, C).

    Args:
        passes: a backend (`ops/dispatch.py`), or `torch_passes`.
        x: (N, C, H, W), dense and not empty.
        batch_size: images in a group, or 0: all of x.
    """
    if batch_size == 0:
        return passes.square_sums(x) / (x.numel() // x.shape[1])
    return group_mean(passes.square_sums(x, True) / (x.shape[2] * x.shape[3]), batch_size)


def push_groups(
    window: torch.Tensor, rows: torch.Tensor, first: torch.Tensor, accepted: torch.Tensor
) -> torch.Tensor:
    """Let this iteration's groups enter the window, in place; return each one's trailing mean.

    Args:
        window: (m, C) statistics of the last m groups before this iteration, the oldest first.
        rows: (G, C) this iteration's statistics.
        first: (1,) bool, True at iteration 1: nothing has entered the window yet. Then each group
            keeps its own statistic, and if G < m the groups are repeated until the window is full.
        accepted: (1,) bool; if False, the window stays.

    Returns:
        (G, C), the means over the m groups that end with each group.
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
    batch_stats_iters: int,
    no_renorm_iters: int,
    clip_limit: float,
    update_state: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what `functional.advance` does, for the x2 (G, C) of an iteration's groups.

    Returns:
        var (G, C), r (G, C), slot (1,), which has no meaning here, and use_batch_stats (1,) bool,
        True at iteration 1 (`batch_stats_iters` is 1 in this form).
    """
    t = iters + 1
    first = t <= batch_stats_iters
    var = push_groups(buffer_x2 if update_state else buffer_x2.clone(), x2, first, accepted)
    mean = var.mean(0).to(running_var.dtype)
    before = torch.where(first, mean, running_var)
    r = renorm(var, before.to(var.dtype), eps, clip_limit)
    r = torch.where(t <= no_renorm_iters, 1.0, r)
    if update_state:
        running_var.copy_(torch.where(accepted, before.lerp(mean, 1 - momentum), running_var))
        iters.add_(accepted)
    return var, r, t % len(buffer_x2), first


advance_groups_op = compiled_op(advance_groups)


class _MABNGroups(torch.autograd.Function):
    """`functional._MABN` with statistics of each group, (G, C)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        var: torch.Tensor,
        r: torch.Tensor,
        eps: float,
        psi_window: torch.Tensor,
        slot: torch.Tensor,
        use_batch_stats: torch.Tensor,
        batch_size: int,
        relu: bool,
    ) -> torch.Tensor:
        ctx.dtypes = weight.dtype, bias.dtype
        var, r_std, scale = scales(var, r, weight.to(r.dtype), eps)
        shift = bias.to(r.dtype)
        # Every backend saves these, in this order: see `torch_ops.mabn_given`.
        ctx.save_for_backward(x, scale, shift if relu else None, var, r_std, slot, use_batch_stats)
        # The backward writes to it, which the checks of save_for_backward forbid.
        ctx.psi_window, ctx.batch_size = psi_window, batch_size
        ctx.set_materialize_grads(False)
        n, c = x.shape[:2]
        return torch_passes.affine(x, to_images(scale, batch_size, n), shift.expand(n, c), relu)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return (None,) * 11
        refuse_second_backward(ctx)
        x, scale, shift, var, r_std, _, use_batch_stats = ctx.saved_tensors
        (n, c, h, w), batch_size = x.shape, ctx.batch_size
        dy = dense_like(dy, x)
        image_scale = to_images(scale, batch_size, n)
        if shift is not None:
            dy = torch_passes.relu_backward(dy, x, image_scale, shift.expand(n, c))
        dyx, dbias = (
            group_sum(sums, batch_size) for sums in torch_passes.product_sums(dy, x, True)
        )
        psi = dyx * scale / (group_sizes(n, batch_size, dyx) * (h * w))
        mean = push_groups(ctx.psi_window, psi, use_batch_stats, is_finite(psi.flatten()))
        dx = None
        if ctx.needs_input_grad[0]:
            scale_x = to_images(-mean / var, batch_size, n)
            dx = torch_passes.combine(dy, x, image_scale, scale_x)
        weight_dtype, bias_dtype = ctx.dtypes
        dweight = (dyx * r_std).sum(0).to(weight_dtype)
        return dx, dweight, dbias.sum(0).to(bias_dtype), *(None,) * 8


def mabn_groups(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    var: torch.Tensor,
    r: torch.Tensor,
    eps: float,
    psi_window: torch.Tensor,
    slot: torch.Tensor,
    use_batch_stats: torch.Tensor,
    batch_size: int,
    relu: bool = False,
) -> torch.Tensor:
    """Normalize each group of images by given statistics: `functional.mabn_train` of groups.

    Args:
        x: (N, C, H, W), dense and not empty, any floating dtype.
        weight, bias: (C,).
        var, r: (G, C), float32 at least; no gradient flows through r.
        eps: added to var.
        psi_window: (m, C), moved by the backward unless E[g z] is not finite.
        slot, use_batch_stats: (1,), what `advance_groups` returned.
        batch_size: images in a group.
        relu: apply ReLU to y, keeping no other tensor for it.

    Returns:
        y, like x.
    """
    return _MABNGroups.apply(
        x, weight, bias, var, r, eps, psi_window, slot, use_batch_stats, batch_size, relu
    )
