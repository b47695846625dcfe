"""The Triton backend: MABN on a GPU.

`mabn` runs a whole layer, in two launches each way: a pass of sums, whose last program makes the
per-channel vectors and moves the state, and a pass that writes the result. The split form takes a
third launch between them. `affine`, `combine`, `product_sums` and `square_sums` are the passes alone.
Each pass reads its inputs once.

Nothing synchronizes, and nothing is tuned by trial, so a CUDA graph can capture all of it. What is
derived from shapes and settings is computed once and kept as a plan.

Activations are (N, C, H, W), contiguous or channels-last, not empty, in float32, float16 or bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from .memory_format import dense_like, memory_format_of
from .second_backward import refuse_second_backward
from .triton_kernels import unavailable as unavailable
from .triton_launch import current_stream
from .triton_plan import LayerPlan, affine_plan, combine_plan, layer_plan, sums_plan

NAME = "Triton"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(*tensors: torch.Tensor) -> str | None:
    """Return why the backend cannot take activations, vectors and windows like these, or None.

    Args:
        tensors: the activation first, dense and not empty.
    """
    device = tensors[0].device
    for x in tensors:
        if not x.is_cuda or x.device != device:
            return f"a tensor is on {x.device}"
        if x.dtype not in DTYPES:
            return f"the Triton kernels have no {x.dtype}".replace("torch.", "")
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            return "a tensor is neither contiguous nor channels-last"
    return _too_old(device)


@functools.cache
def _too_old(device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device) >= (8, 0):  # the first with bfloat16
        return None
    return "the Triton kernels need compute capability 8.0"


def mabn(x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, Statistics]:
    """Run a whole layer in training; see `torch_ops.mabn`."""
    device = x.get_device()
    if device < 0 or device == torch.cuda.current_device():
        return _mabn(x, *arguments)
    with torch.cuda.device(device):
        return _mabn(x, *arguments)


def _mabn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    psi_window: torch.Tensor,
    window: torch.Tensor,
    running_var: torch.Tensor,
    iters: torch.Tensor,
    rejected: torch.Tensor,
    eps: float,
    momentum: float,
    batch_stats_iters: int,
    no_renorm_iters: int,
    clip_limit: float,
    update_state: bool,
    relu: bool,
    batch_size: int = 0,
) -> tuple[torch.Tensor, Statistics]:
    device = x.get_device()
    if not (weight.is_contiguous() and bias.is_contiguous()):
        weight, bias = weight.contiguous(), bias.contiguous()
    if weight.get_device() != device or bias.get_device() != device:
        raise RuntimeError(f"weight and bias must be on {x.device}, as x; weight: {weight.device}")
    plan = layer_plan(
        x.shape,
        x.dtype,
        x.is_contiguous(),
        device,
        batch_size,
        (weight.dtype, bias.dtype),
        window.shape[0],
        relu,
        eps,
        (momentum, batch_stats_iters, no_renorm_iters, clip_limit, update_state),
    )
    stream = current_stream(device)
    vectors = x.new_empty(plan.vectors_size, dtype=torch.float32)
    arguments = (x, weight, bias, window, running_var, iters, rejected, vectors)
    plan.forward_sums.launch(stream, *arguments)
    if plan.grouped:
        plan.advance_groups(stream, weight, bias, window, running_var, vectors)
    y = _MABN.apply(x, weight, bias, psi_window, vectors, plan, stream)
    return y, Statistics(vectors, plan, update_state)


def mabn_given(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    psi_window: torch.Tensor,
    var: torch.Tensor,
    r: torch.Tensor,
    slot: torch.Tensor,
    use_batch_stats: torch.Tensor,
    eps: float,
    relu: bool,
    batch_size: int = 0,
) -> torch.Tensor:
    """Return `mabn`'s y for statistics that are given; see `torch_ops.mabn_given`."""
    device = x.get_device()
    plan = layer_plan(
        x.shape,
        x.dtype,
        x.is_contiguous(),
        device,
        batch_size,
        (weight.dtype, bias.dtype),
        psi_window.shape[0],
        relu,
        eps,
        None,
    )
    with torch.no_grad():
        r_std = r * (var + eps).rsqrt()
        rows = var, var, r, r_std, r_std * weight.float(), bias.float().expand_as(var)
        unused = use_batch_stats.new_zeros(2, dtype=torch.float32)
        flags = slot.float(), use_batch_stats.float(), unused
        vectors = torch.cat([tensor.flatten() for tensor in (*rows, *flags)])
    with _on(device):
        return _MABN.apply(x, weight, bias, psi_window, vectors, plan, current_stream(device))


class Statistics:
    """The fields of `mabn.Statistics`, made from a forward's vectors when they are asked for."""

    __slots__ = ("plan", "update_state", "vectors")

    def __init__(self, vectors: torch.Tensor, plan: LayerPlan, update_state: bool) -> None:
        self.vectors, self.plan, self.update_state = vectors, plan, update_state

    def __iter__(self) -> Iterator[torch.Tensor]:
        rows, flags = self.vectors.split((len(self.vectors) - 4, 4))
        yield from rows.view(6, *self.plan.shape)[:3].unbind()
        yield flags[:1].long()
        use_batch_stats = flags[1:2] != 0
        yield use_batch_stats
        yield torch.full_like(use_batch_stats, self.update_state)


class _MABN(torch.autograd.Function):
    """y from x and the vectors of `forward_sums`; both are all that the backward needs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        psi_window: torch.Tensor,
        vectors: torch.Tensor,
        plan: LayerPlan,
        stream: int,
    ) -> torch.Tensor:
        y = torch.empty_like(x)
        plan.affine(stream, x, vectors, vectors, y)
        ctx.save_for_backward(x, vectors)
        # Written to in the backward, which the checks of save_for_backward forbid.
        ctx.psi_window, ctx.plan = psi_window, plan
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        if ctx.plan.grouped:
            refuse_second_backward(ctx)
        x, vectors = ctx.saved_tensors
        needs_dx = ctx.needs_input_grad[0]
        dx, dweight, dbias = _backward(ctx.plan, dy, x, vectors, ctx.psi_window, needs_dx)
        return dx, dweight, dbias, None, None, None, None


def _backward(
    plan: LayerPlan,
    dy: torch.Tensor,
    x: torch.Tensor,
    vectors: torch.Tensor,
    psi_window: torch.Tensor,
    needs_dx: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return dx, None unless needs_dx, dweight and dbias; psi enters the window if it is finite."""
    device = x.get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _backward(plan, dy, x, vectors, psi_window, needs_dx)
    dy = dense_like(dy, x)
    stream = current_stream(device)
    factor = vectors.new_empty(plan.factor_size)
    dweight, dbias = (vectors.new_empty(plan.channels, dtype=dtype) for dtype in plan.dtypes)
    arguments = (dy, x, vectors, psi_window, factor, dweight, dbias)
    plan.backward_sums.launch(stream, *arguments)
    if plan.grouped:
        plan.push_groups(stream, vectors, factor, psi_window)
    if not needs_dx:
        return None, dweight, dbias
    dx = torch.empty_like(x)
    if plan.relu:
        plan.combine(stream, dy, x, vectors, factor, vectors, dx)
    else:
        plan.combine(stream, dy, x, vectors, factor, dx)
    return dx, dweight, dbias


# The passes alone.


def affine(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, relu: bool = False
) -> torch.Tensor:
    """Return scale * x + shift, or its ReLU; see `torch_passes.affine`."""
    per_image = _has_rows(x, scale, shift)
    scale, shift = (_as_rows(x, vector, per_image) for vector in (scale, shift))
    y = torch.empty_like(x)
    device = x.get_device()
    with _on(device):
        plan = affine_plan(x.shape, x.dtype, x.is_contiguous(), device, per_image, relu)
        plan(current_stream(device), x, scale, shift, y)
    return y


def combine(
    dy: torch.Tensor,
    x: torch.Tensor,
    dy_scale: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return dy_scale * dy + scale * x + shift; see `torch_passes.combine`."""
    _check(x, dy)
    vectors = [dy_scale, scale] if shift is None else [dy_scale, scale, shift]
    per_image = _has_rows(x, *vectors)
    vectors = [_as_rows(x, vector, per_image) for vector in vectors]
    dx = torch.empty_like(x)
    device = x.get_device()
    with _on(device):
        meta = x.shape, x.dtype, x.is_contiguous(), device
        plan = combine_plan(*meta, per_image, shift is not None)
        plan(current_stream(device), dy, x, *vectors, dx)
    return dx


def product_sums(
    dy: torch.Tensor, x: torch.Tensor, per_image: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sum(dy * x) and sum(dy); see `torch_passes.product_sums`."""
    _check(x, dy)
    products, totals = _sums(per_image, dy, x)
    return products, totals


def square_sums(x: torch.Tensor, per_image: bool = False) -> torch.Tensor:
    """Return sum(x * x); see `torch_passes.square_sums`."""
    _check(x)
    return _sums(per_image, x)[0]


def _sums(per_image: bool, *activations: torch.Tensor) -> torch.Tensor:
    """Return the sums of dy * x and dy, or of x * x: (2 or 1, C), or (2 or 1, N, C)."""
    x = activations[-1]
    device = x.get_device()
    with _on(device):
        meta = x.shape, x.dtype, x.is_contiguous(), device
        plan = sums_plan(*meta, per_image, len(activations) == 2)
        plan.ensure_grid(*activations, x.new_empty(0, dtype=torch.float32))
        partial = x.new_empty(plan.partials, dtype=torch.float32)
        plan(current_stream(device), *activations, partial)
    rows = partial.view(plan.kinds, -1, plan.rows, x.shape[1]).sum(2)
    return rows if per_image else rows.squeeze(1)


def _on(device: int) -> contextlib.AbstractContextManager:
    """Return a context in which a device is the current one; -1 is a CPU."""
    return torch.cuda.device(device) if device >= 0 else contextlib.nullcontext()


def _check(x: torch.Tensor, dy: torch.Tensor | None = None) -> None:
    """Raise ValueError if x is not dense, or dy is not like x."""
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"expected contiguous or channels-last, got strides {x.stride()}")
    if dy is not None and not (
        dy.shape == x.shape
        and dy.dtype == x.dtype
        and dy.is_contiguous(memory_format=memory_format_of(x))
    ):
        raise ValueError("expected two tensors of the same shape, dtype and memory format")


def _has_rows(x: torch.Tensor, *vectors: torch.Tensor) -> bool:
    """Return whether any of the vectors has a row for each image; check x."""
    _check(x)
    return any(vector.dim() == 2 for vector in vectors)


def _as_rows(x: torch.Tensor, vector: torch.Tensor, per_image: bool) -> torch.Tensor:
    """Return a vector (C,) or (N, C) as (N, C) if `per_image`."""
    return vector.expand(x.shape[:2] if per_image else x.shape[1:2]).contiguous()
