"""The passes over whole activations: two reductions and two per-channel combinations.

All of them are torch's own batch-norm kernels in their evaluation form, with a mean of zero: the
statistics are then arguments, so each call is exactly one pass, and it is vectorized, threaded and
aware of memory format on every device. The forms that look more natural (`x.square().mean`,
`torch.var_mean`, `batch_norm_update_stats`) measured 1.5 to 10 times slower on CPU.

Activations are (N, C, H, W) with at least one element, per-channel vectors (C,), in float32 where
activations are float16, bfloat16 or float32, and in float64 where they are float64.
"""

import torch

NO_MOMENTUM = 0.0  # running statistics are left alone in evaluation form


def dense(x):
    """Return x, or a copy that is contiguous in the memory format nearest to x's own."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    strides = x.stride()
    channels_last = strides[1] == 1 and strides[3] <= strides[2] <= strides[0]
    return x.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def dense_like(dy, x):
    """Return dy in the memory format of x, which is dense."""
    if x.is_contiguous():
        return dy.contiguous()
    return dy.contiguous(memory_format=torch.channels_last)


def mean_square(x):
    """Return mean(x^2) over N, H, W. It is the weight's gradient of x * weight at dy = x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    ones = torch.ones(x.shape[1], dtype=dtype, device=x.device)
    total, _ = product_sums(x, x, ones, 0.0)
    return total / (x.numel() // x.shape[1])


def scale_shift(x, weight, bias, var, eps):
    """Return weight * x / sqrt(var + eps) + bias in the dtype and memory format of x."""
    mean = torch.zeros_like(var)
    return torch.native_batch_norm(x, weight, bias, mean, var, False, NO_MOMENTUM, eps)[0]


def product_sums(dy, x, var, eps):
    """Return sum(dy * x) / sqrt(var + eps) and sum(dy) over N, H, W."""
    mean = torch.zeros_like(var)
    return torch.ops.aten.native_batch_norm_backward(
        dy, x, None, mean, var, None, None, False, eps, [False, True, True]
    )[1:]


def combine(dy, x, weight_dy, weight_x, var, eps):
    """Return weight_dy * dy + weight_x * x / sqrt(var + eps) in the dtype and format of x."""
    out = scale_shift(x, weight_x, None, var, eps)
    return out.addcmul_(dy, weight_dy.to(x.dtype)[:, None, None])
