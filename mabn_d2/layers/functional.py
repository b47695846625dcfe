r"""The mathematics of Moving Average Batch Normalization, without state of its own.

Source: "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization",
ICLR 2020, https://openreview.net/forum?id=SkgGjRVKDS. The convolution in front has zero-centred
filters (`CenConv2d`), so no mean is subtracted and the second moment takes the variance's place.
Then the backward of the normalization needs one batch statistic, psi = mean(g * z), where
BatchNorm's needs two, and both remaining statistics (E[x^2] and psi) may be replaced by averages
over the last iterations.

Per-channel vectors are (C,), windows (m, C); everything here happens on the tensors' device without
a synchronization: conditions are tensors, branches are `torch.where`.
"""

import torch
import torch.nn.functional as F

from .ops import torch_ops


def is_finite(vector):
    """Return whether all elements of a (C,) vector are finite, as a (1,) bool."""
    # One reduction; isfinite().all() takes five operations.
    return torch.linalg.vector_norm(vector, torch.inf, dim=0, keepdim=True) < torch.inf


def push(window, slot, value, accepted):
    """Write value (C,) into window[slot] where `accepted`, in place, and return the window's mean.

    Args:
        window: (m, C) the last m statistics, in any order.
        slot: (1,) int64, the row to replace.
        accepted: (1,) bool; where False nothing is written.
    """
    row = torch.where(accepted, value.to(window.dtype), window.index_select(0, slot))
    window.index_copy_(0, slot, row)
    return window.mean(0)


def renorm(var, running_var, eps, clip_limit):
    """Return r = sqrt(var + eps) / sqrt(running_var + eps), clamped to [1 / limit, limit].

    With it y is normalized by the long-term statistic (EMAS, section 4.1) but the backward by the
    window's (SMAS): no gradient flows through r, as in Batch Renormalization.
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
    warmup_iters: int,
    clip_start: int,
    clip_limit: float,
    counts: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose what one input is normalized by and, if `counts`, move the state by it, in place.

    Args:
        x2: (C,) mean(x^2) of the input.
        accepted: (1,) bool; where False the input enters neither window nor running_var.
        buffer_x2, running_var, iters: the layer's state, (m, C), (C,), (1,).
        eps, momentum, warmup_iters, clip_start, clip_limit: see MABN2d.

    Returns:
        var (C,), r (C,), slot (1,) and plain (1,), as `mabn_train` takes them.
    """
    t = iters + 1
    m = buffer_x2.shape[0]
    slot = t % m
    plain = t <= max(m, warmup_iters - 1)
    mean = push(buffer_x2 if counts else buffer_x2.clone(), slot, x2, accepted)
    var = torch.where(plain, x2, mean.to(x2.dtype))
    r = renorm(var, running_var.to(var.dtype), eps, clip_limit)
    r = torch.where(t <= max(clip_start, warmup_iters), 1.0, r)
    if counts:
        target = torch.where(accepted, var.to(running_var.dtype), running_var)
        running_var.lerp_(target, 1 - momentum)
        iters.add_(accepted)
    return var, r, slot, plain


# For torch.compile: its partitioner would compute r again in the backward, from a running_var that
# has moved since. What an operator of its own returns is kept.
advance_op = torch.library.custom_op(
    "mabn_d2::advance", advance, mutates_args=("buffer_x2", "running_var", "iters")
)


@advance_op.register_fake
def _(x2, accepted, buffer_x2, running_var, iters, *arguments):
    slot = torch.empty_like(iters)
    return torch.empty_like(x2), torch.empty_like(x2), slot, torch.empty_like(accepted)


def _scales(var, r, weight, eps):
    """Return var + eps, r / sqrt(var + eps) and weight times that; all (C,)."""
    var = var + eps
    r_std = r * var.rsqrt()
    return var, r_std, r_std * weight


def _backward_scales(dyx, scale, var, r_std, psi_window, slot, plain, count):
    """Return the factor of x in dx, and dweight; psi enters the window.

    Args:
        dyx: (C,) sum(dy * x) over `count` elements.
        scale, var, r_std: of the forward, var with eps.
        psi_window, slot, plain: see `mabn_train`.
    """
    psi = (dyx * scale).div_(count)  # mean(g * z), g = dy * weight * r
    window_mean = push(psi_window, slot, psi, is_finite(psi))
    psi = torch.where(plain, psi, window_mean.to(psi.dtype))
    return psi.div_(var).neg_(), dyx * r_std


class _MABN(torch.autograd.Function):
    """y = relu?(weight * r * z + bias), z = x / sqrt(var + eps); keeps x and vectors only."""

    @staticmethod
    def forward(ctx, x, weight, bias, var, r, eps, relu, psi_window, slot, plain):
        ctx.dtypes = weight.dtype, bias.dtype
        var, r_std, scale = _scales(var, r, weight.to(r.dtype), eps)
        shift = bias.to(r.dtype)
        ctx.save_for_backward(x, scale, shift if relu else None, var, r_std, slot, plain)
        # Written to in the backward, which the checks of save_for_backward forbid.
        ctx.psi_window = psi_window
        affine = torch_ops.scale_shift_relu if relu else torch_ops.scale_shift
        return affine(x, scale, shift)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, scale, shift, var, r_std, slot, plain = ctx.saved_tensors
        dy = torch_ops.dense_like(dy, x)
        relu = shift is not None
        if relu:
            dyx, dbias, dy = torch_ops.relu_sums(dy, x, scale, shift)
        else:
            dyx, dbias = torch_ops.product_sums(dy, x)
        scale_x, dweight = _backward_scales(
            dyx, scale, var, r_std, ctx.psi_window, slot, plain, x.numel() // x.shape[1]
        )
        dx = None
        if ctx.needs_input_grad[0]:
            # dx = (g - z * psi) / sqrt(var), g = dy * weight * r, z = x / sqrt(var)
            if relu:
                dx = torch_ops.relu_combine(dy, x, scale, scale_x, shift)
            else:
                dx = torch_ops.combine(dy, x, scale, scale_x)
        weight_dtype, bias_dtype = ctx.dtypes
        return dx, dweight.to(weight_dtype), dbias.to(bias_dtype), *(None,) * 7


def mabn_train(x, weight, bias, var, r, eps, psi_window, slot, plain, relu=False):
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
        psi_window: (m, C), moved by the backward unless psi is not finite.
        slot: (1,) int64, the row of the window that belongs to this forward.
        plain: (1,) bool, True where P is to be psi itself.
        relu: apply ReLU to y, keeping no other tensor for it.
    """
    return _MABN.apply(x, weight, bias, var, r, eps, relu, psi_window, slot, plain)


def mabn_eval(x, weight, bias, running_var, eps):
    """Return weight * x / sqrt(running_var + eps) + bias in the dtype of x: one affine pass each way.

    x may be empty; then the result is, and the gradients are zeros.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias, var = weight.to(dtype), bias.to(dtype), running_var.to(dtype)
    return F.batch_norm(x, torch.zeros_like(var), var, weight, bias, False, 0.0, eps)
