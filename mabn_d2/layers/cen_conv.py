"""Convolution with zero-centred filters, the companion of MABN2d."""

from typing import Any

import torch
from torch import nn


def center_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return weight (O, I, kH, kW) minus its mean over input channels and kernel, per filter."""
    return weight - weight.mean(dim=(1, 2, 3), keepdim=True)


class _CenConv(torch.autograd.Function):
    """The convolution with centred filters. It saves the weight itself, not a centred copy."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        *geometry: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.geometry = dtype, geometry
        ctx.bias = None if bias is None else (bias.dtype, bias.shape)
        if bias is not None:
            bias = bias.to(dtype)
        return torch.convolution(x, center_weight(weight).to(dtype), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return (None,) * 10
        x, weight = ctx.saved_tensors
        needed = [*ctx.needs_input_grad[:2], ctx.bias is not None and ctx.needs_input_grad[2]]
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            dy,
            x,
            center_weight(weight).to(ctx.dtype),
            ctx.bias and ctx.bias[1],
            *ctx.geometry,
            needed,
        )
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
            mean = dweight.mean(dim=(1, 2, 3), keepdim=True)
            # In place, as nobody else has it; but for a second derivative.
            dweight = dweight - mean if torch.is_grad_enabled() else dweight.sub_(mean)
        if dbias is not None:
            dbias = dbias.to(ctx.bias[0])
        return dx, dweight, dbias, *(None,) * 7


def _is_cast(tensor: torch.Tensor) -> bool:
    """Return whether autocast changes the dtype of a convolution's argument."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def _is_transformed() -> bool:
    """Return whether torch.func or forward-mode differentiation looks at what runs now."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


class CenConv2d(nn.Conv2d):
    """`nn.Conv2d` whose filters are centred in the forward ("weight centralization").

    Arguments, parameters and state are those of `nn.Conv2d`. If the inputs have equal means over a
    filter's channels, its outputs have a mean of zero: this is why MABN2d subtracts none (section 4.2
    of the paper). The stored weight is free: its mean gets no gradient.

    In training no copy of the filters is kept for the backward, which centres them once more.
    """

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if (
            not torch.is_grad_enabled()
            or not weight.requires_grad
            or torch.compiler.is_compiling()  # which decides for itself what to keep
            or torch.jit.is_tracing()
            or isinstance(self.padding, str)
            or self.padding_mode != "zeros"
            or not torch.amp.is_autocast_available(input.device.type)  # meta
            or input.dim() != 4
            or _is_transformed()
        ):
            return super()._conv_forward(input, center_weight(weight), bias)
        device, dtype = input.device.type, input.dtype
        if torch.is_autocast_enabled(device) and _is_cast(input) and _is_cast(weight):
            dtype = torch.get_autocast_dtype(device)
        elif dtype != weight.dtype:
            return super()._conv_forward(input, center_weight(weight), bias)  # its error
        geometry = self.stride, self.padding, self.dilation, False, (0, 0), self.groups
        with torch.autocast(device, enabled=False):
            return _CenConv.apply(input.to(dtype), weight, bias, dtype, *geometry)
