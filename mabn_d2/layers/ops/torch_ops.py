"""The passes over whole activations: two reductions and two per-channel combinations.

What `dispatch.find` finds does them: compiled operators on a CPU, Triton's on a GPU. Elsewhere most
are torch's own batch-norm kernels in their evaluation form, with a mean of zero and a variance of one:
exactly one pass, vectorized, threaded and aware of memory format on every device. What looks more
natural (`x.square().mean`, `torch.var_mean`, `batch_norm_update_stats`) measured 1.5 to 10 times slower
on CPU. There, in float32, some combinations are still faster by `mul` and `addcmul`; in half precision
those would round the vectors.

Activations are (N, C, H, W) with at least one element, per-channel vectors (C,), in float32 where
activations are float16, bfloat16 or float32, and in float64 where they are float64.
"""

import torch

from .dispatch import find


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
    """Return mean(x^2) over N, H, W."""
    return product_sums(x, x)[0].div_(x.numel() // x.shape[1])


def product_sums(dy, x):
    """Return sum(dy * x) and sum(dy) over N, H, W."""
    if operators := find(x):
        return operators.product_sums(dy, x)
    # They are the gradients of weight and bias in x * weight + bias.
    mean, var = _standard(x)
    return torch.ops.aten.native_batch_norm_backward(
        dy, x, None, mean, var, None, None, False, 0.0, [False, True, True]
    )[1:]


def scale_shift(x, scale, shift=None):
    """Return scale * x + shift in the dtype and memory format of x."""
    if shift is not None and (operators := find(x)):
        return operators.affine(x, scale, shift)
    if shift is not None and _is_full_precision_on_cpu(x) and not x.is_contiguous():
        return torch.addcmul(maps(shift), x, maps(scale))  # twice as fast in channels_last
    mean, var = _standard(x)
    return torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, 0.0)[0]


def combine(dy, x, scale_dy, scale_x):
    """Return scale_dy * dy + scale_x * x in the dtype and memory format of x."""
    if operators := find(x):
        return operators.combine(dy, x, scale_dy, scale_x)
    out = x * maps(scale_x) if _is_full_precision_on_cpu(x) else scale_shift(x, scale_x)
    # In half precision scale_dy is rounded, for it is the one that can't overflow.
    return out.addcmul_(dy, maps(scale_dy.to(x.dtype)))


def scale_shift_relu(x, scale, shift):
    """Return relu(scale * x + shift) in the dtype and memory format of x."""
    if operators := find(x):
        return operators.affine(x, scale, shift, True)
    return scale_shift(x, scale, shift).relu_()


def relu_sums(dy, x, scale, shift):
    """Return `product_sums` of dy behind relu(scale * x + shift), and dy for `relu_combine`."""
    if operators := find(x):
        return *operators.product_sums(dy, x, False, scale, shift), dy
    # The sign is computed again: cheaper than keeping y when nothing else does.
    dy = torch.ops.aten.threshold_backward(dy, scale_shift(x, scale, shift), 0)
    return *product_sums(dy, x), dy


def relu_combine(dy, x, scale_dy, scale_x, shift):
    """Return `combine` of the dy that `relu_sums`, of scale_dy and shift, returned."""
    if operators := find(x):
        return operators.combine(dy, x, scale_dy, scale_x, None, shift)
    return combine(dy, x, scale_dy, scale_x)


def maps(vector):
    """Return a (C,) vector, or (N, C) of them, as it broadcasts over (N, C, H, W)."""
    return vector[..., None, None]


def _is_full_precision_on_cpu(x):
    return x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu"


def _standard(x):
    """Return the mean (zeros) and variance (ones) that leave x as it is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    like = {"dtype": dtype, "device": x.device}
    return torch.zeros(x.shape[1], **like), torch.ones(x.shape[1], **like)
