r"""The mathematics of Moving Average Batch Normalization, without state of its own.

Source: "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization",
ICLR 2020, https://openreview.net/forum?id=SkgGjRVKDS. The convolution in front has zero-centred
filters (`CenConv2d`), so no mean is subtracted and the second moment takes the variance's place.
Then the backward of the normalization needs one batch statistic, psi = mean(g * z), where
BatchNorm's needs two, and both remaining statistics (E[x^2] and psi) may be replaced by averages
over the last iterations.

Per-channel vectors are (C,), windows (m, C). Nothing here synchronizes with the tensors' device:
conditions are tensors, branches are `torch.where`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .ops import torch_passes
from .ops.memory_format import dense_like


def is_finite(vector: torch.Tensor) -> torch.Tensor:
    """Return whether all elements of a (C,) vector are finite, as a (1,) bool."""
    # One reduction; isfinite().all() takes five operations.
    return torch.linalg.vector_norm(vector, torch.inf, dim=0, keepdim=True) < torch.inf


def push(
    window: torch.Tensor, slot: torch.Tensor, value: torch.Tensor, accepted: torch.Tensor
) -> torch.Tensor:
    """Write value (C,) into window[slot] if `accepted`, in place, and return the window's mean.

    Args:
        window: (m, C) the last m statistics, in any order.
        slot: (1,) int64, the row to replace.
        value: (C,) the new statistic.
        accepted: (1,) bool; if False, nothing is written.
    """
    row = torch.where(accepted, value.to(window.dtype), window.index_select(0, slot))
    window.index_copy_(0, slot, row)
    return window.mean(0)


def renorm(
    var: torch.Tensor, running_var: torch.Tensor, eps: float, clip_limit: float
) -> torch.Tensor:
    """Return r = sqrt(var + eps) / sqrt(running_var + eps), clamped to [1 / limit, limit].

    With r, y is normalized by the long-term statistic (EMAS, section 4.1 of the paper), while the
    backward uses the window's (SMAS). No gradient flows through r, as in Batch Renormalization.
    """
    return ((var + eps) / (running_var + eps)).sqrt_().clamp_(1 / clip_limit, clip_limit)


def advance(
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
    """Choose what an input is normalized by; if `update_state`, move the state by it, in place.

    Args:
        x2: (C,) mean(x^2) of the input.
        accepted: (1,) bool; if False, the input enters neither window nor running_var.
        buffer_x2, running_var, iters: the layer's state, (m, C), (C,), (1,).
        eps, momentum, clip_limit: see MABN2d.
        batch_stats_iters: up to this iteration var is x2.
        no_renorm_iters: up to this iteration r is 1.
        update_state: whether this forward moves the state.

    Returns:
        var (C,), r (C,), slot (1,) and use_batch_stats (1,), the arguments of `mabn_train`.
    """
    t = iters + 1
    slot = t % buffer_x2.shape[0]
    use_batch_stats = t <= batch_stats_iters
    mean = push(buffer_x2 if update_state else buffer_x2.clone(), slot, x2, accepted)
    var = torch.where(use_batch_stats, x2, mean.to(x2.dtype))
    r = renorm(var, running_var.to(var.dtype), eps, clip_limit)
    r = torch.where(t <= no_renorm_iters, 1.0, r)
    if update_state:
        target = torch.where(accepted, var.to(running_var.dtype), running_var)
        running_var.lerp_(target, 1 - momentum)
        iters.add_(accepted)
    return var, r, slot, use_batch_stats


def in_backward() -> bool:
    """Return whether a backward runs: a forward there is one that activation checkpointing repeats."""
    return torch._C._current_graph_task_id() != -1


def is_reentrant() -> bool:
    """Return whether it is reentrant checkpointing that repeats a forward in this backward.

    That is done by the backward of a function, whose forward ran without gradients. Otherwise it is
    done where the backward of something else needs a tensor.
    """
    node = torch._C._current_autograd_node()
    return node is not None and "CheckpointFunction" in node.name()


def refusing_repetition(advance: Callable[..., Any]) -> Callable[..., Any]:
    """Let `advance` raise RuntimeError where compiled code repeats it for activation checkpointing.

    Outside of torch.compile the layer recognizes the repetition (`MABN2d._repeat`). Compiled code
    would move the state twice, or use the state that the first time has moved.
    """

    @functools.wraps(advance)
    def checked(
        x2: torch.Tensor, accepted: torch.Tensor, buffer_x2: torch.Tensor, *arguments: Any
    ) -> Any:
        # The first forward of reentrant checkpointing runs without gradients and has moved nothing: its
        # repetition is the first time, also of a batch that an earlier iteration had.
        newest = x2[-1:] if x2.dim() > 1 else x2
        repeats = in_backward() and not is_reentrant()
        if repeats and torch.isclose(buffer_x2, newest).all(1).any():
            raise RuntimeError(
                "MABN2d can't be repeated by activation checkpointing under torch.compile: it would "
                "count a batch twice; checkpoint with use_reentrant=True around the compiled module, "
                "or do without one of them"
            )
        return advance(x2, accepted, buffer_x2, *arguments)

    return checked


def compiled_op(advance: Callable[..., Any]) -> Any:
    """Return `advance`, or its form for groups, as a custom operator for torch.compile.

    The compiler's partitioner would compute r again in the backward, from a running_var that has moved
    since. It keeps the results of a custom operator.
    """
    op = torch.library.custom_op(
        f"mabn_d2::{advance.__name__}",
        refusing_repetition(advance),
        mutates_args=("buffer_x2", "running_var", "iters"),
    )

    @op.register_fake
    def _(
        x2: torch.Tensor,
        accepted: torch.Tensor,
        buffer_x2: torch.Tensor,
        running_var: torch.Tensor,
        iters: torch.Tensor,
        *arguments: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        slot = torch.empty_like(iters)
        return torch.empty_like(x2), torch.empty_like(x2), slot, torch.empty_like(accepted)

    return op


advance_op = compiled_op(advance)


def scales(
    var: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return var + eps, r / sqrt(var + eps) and weight times that, all like var."""
    var = var + eps
    r_std = r * var.rsqrt()
    return var, r_std, r_std * weight


class _MABN(torch.autograd.Function):
    """y = relu?(weight * r * z + bias), z = x / sqrt(var + eps); keeps x and vectors only."""

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
        relu: bool,
    ) -> torch.Tensor:
        ctx.dtypes = weight.dtype, bias.dtype
        var, r_std, scale = scales(var, r, weight.to(r.dtype), eps)
        shift = bias.to(r.dtype)
        # Every backend saves these, in this order: see `torch_ops.mabn_given`.
        ctx.save_for_backward(x, scale, shift if relu else None, var, r_std, slot, use_batch_stats)
        # The backward writes to it, which the checks of save_for_backward forbid.
        ctx.psi_window = psi_window
        ctx.set_materialize_grads(False)
        return torch_passes.affine(x, scale, shift, relu)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return (None,) * 10
        x, scale, shift, var, r_std, slot, use_batch_stats = ctx.saved_tensors
        dy = dense_like(dy, x)
        if shift is not None:
            dy = torch_passes.relu_backward(dy, x, scale, shift)
        dyx, dbias = torch_passes.product_sums(dy, x)
        psi = (dyx * scale).div_(x.numel() // x.shape[1])  # mean(g * z), g = dy * weight * r
        mean = push(ctx.psi_window, slot, psi, is_finite(psi))
        psi = torch.where(use_batch_stats, psi, mean.to(psi.dtype))
        dx = None
        if ctx.needs_input_grad[0]:
            # dx = (g - z * psi) / sqrt(var), g = dy * weight * r, z = x / sqrt(var)
            dx = torch_passes.combine(dy, x, scale, psi.div_(var).neg_())
        weight_dtype, bias_dtype = ctx.dtypes
        return dx, (dyx * r_std).to(weight_dtype), dbias.to(bias_dtype), *(None,) * 7


def mabn_train(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    var: torch.Tensor,
    r: torch.Tensor,
    eps: float,
    psi_window: torch.Tensor,
    slot: torch.Tensor,
    use_batch_stats: torch.Tensor,
    relu: bool = False,
) -> torch.Tensor:
    r"""Normalize by given statistics; the backward averages psi over `psi_window`.

    .. math::
        z = x / \sqrt{v + \epsilon}, \quad y = w\, r\, z + b, \quad
        dx = (g - z P) / \sqrt{v + \epsilon}, \quad g = dy\, w\, r, \quad \psi = E[g z]

    where P is psi, or the mean of the window that psi has entered. (Algorithm 1 and equations 14-18
    of the paper.)

    Args:
        x: (N, C, H, W), dense, any floating dtype.
        weight, bias: (C,).
        var: (C,) v, a mean of x^2 over one or more batches; float32 at least.
        r: (C,), no gradient flows through it.
        eps: added to var.
        psi_window: (m, C), moved by the backward unless psi is not finite.
        slot: (1,) int64, the row of the window that belongs to this forward.
        use_batch_stats: (1,) bool, True if P is psi itself.
        relu: apply ReLU to y, keeping no other tensor for it.

    Returns:
        y, like x.
    """
    return _MABN.apply(x, weight, bias, var, r, eps, psi_window, slot, use_batch_stats, relu)


def mabn_eval(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_var: torch.Tensor,
    eps: float,
    relu: bool = False,
) -> torch.Tensor:
    """Return weight * x / sqrt(running_var + eps) + bias, or its ReLU: one affine pass each way.

    Args:
        x: (N, C, H, W), any floating dtype. It may be empty: then the gradients are zeros.
        weight, bias, running_var: (C,).
        eps: added to running_var.
        relu: whether to apply ReLU.

    Returns:
        y, in the dtype of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias, var = weight.to(dtype), bias.to(dtype), running_var.to(dtype)
    y = F.batch_norm(x, torch.zeros_like(var), var, weight, bias, False, 0.0, eps)
    return y.relu_() if relu else y
