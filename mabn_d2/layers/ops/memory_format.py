"""Memory formats: every kernel takes activations that are contiguous or channels-last."""

import torch


def memory_format_of(x: torch.Tensor) -> torch.memory_format:
    """Return the memory format of a dense x (N, C, H, W); contiguous if both formats fit."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def dense(x: torch.Tensor) -> torch.Tensor:
    """Return x (N, C, H, W), or a copy that is contiguous in the memory format nearest to x's own."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    strides = x.stride()
    channels_last = strides[1] == 1 and strides[3] <= strides[2] <= strides[0]
    return x.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def dense_like(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return dy in the memory format of x, which is dense and has the same shape."""
    return dy.contiguous(memory_format=memory_format_of(x))
