"""The passes over whole activations in torch's own kernels: sums and per-channel affine maps.

Most of them are torch's batch-norm kernels in their evaluation form, with a mean of zero and a
variance of one: exactly one pass, vectorized, threaded and aware of memory format on every device.
What looks more natural (`x.square().mean`, `torch.var_mean`, `batch_norm_update_stats`) measured 1.5
to 10 times slower on CPU. There, in float32, `mul` and `addcmul` are faster for some passes; in half
precision they would round the vectors.

Activations are (N, C, H, W), dense (`memory_format.py`), with at least one element. Vectors are (C,),
or (N, C) with a row for each image, in float32 at least. Contiguous activations with a row for each
image are viewed as (1, N * C, H, W), so that the batch-norm kernels serve them too. In channels-last
this is no view, and elementwise kernels do the work.
"""

import torch

aten = torch.ops.aten


def affine(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, relu: bool = False
) -> torch.Tensor:
    """Return scale * x + shift, or its ReLU, in the dtype and memory format of x.

    Args:
        x: (N, C, H, W).
        scale, shift: (C,) or (N, C).
        relu: whether to apply ReLU.
    """
    y = _affine(x, scale, shift)
    return y.relu_() if relu else y


def combine(
    dy: torch.Tensor,
    x: torch.Tensor,
    dy_scale: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return dy_scale * dy + scale * x + shift in the dtype and memory format of x.

    Args:
        dy, x: (N, C, H, W), alike.
        dy_scale, scale, shift: (C,) or (N, C); no shift is zero.
    """
    if shift is None and _is_full_precision_on_cpu(x):
        out = x * broadcast(scale)
    else:
        out = _affine(x, scale, torch.zeros_like(scale) if shift is None else shift)
    # In half precision dy_scale is rounded, because it is the factor that cannot overflow.
    return out.addcmul_(dy, broadcast(dy_scale.to(x.dtype)))


def product_sums(
    dy: torch.Tensor, x: torch.Tensor, per_image: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sum(dy * x) and sum(dy) over N, H, W as (C,), or over H, W as (N, C) if `per_image`.

    Args:
        dy, x: (N, C, H, W), alike.
        per_image: whether each image has sums of its own.
    """
    n, c = x.shape[:2]
    if not per_image:
        return _product_sums(dy, x)
    if x.is_contiguous():
        products, totals = _product_sums(_images_as_channels(dy), _images_as_channels(x))
        return products.view(n, c), totals.view(n, c)
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Products in half precision overflow, or lose digits, before they are summed.
    return torch.mul(dy.to(dtype), x.to(dtype)).sum((2, 3)), dy.sum((2, 3), dtype=dtype)


def square_sums(x: torch.Tensor, per_image: bool = False) -> torch.Tensor:
    """Return sum(x^2) over N, H, W as (C,), or over H, W as (N, C) if `per_image`."""
    if per_image and not x.is_contiguous():
        return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum((2, 3))
    return product_sums(x, x, per_image)[0]


def relu_backward(
    dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """Return dy where scale * x + shift > 0 (or NaN), else 0.

    The sign is computed again: this is cheaper than to keep y where nothing else keeps it.
    """
    return aten.threshold_backward(dy, _affine(x, scale, shift), 0)


def broadcast(vector: torch.Tensor) -> torch.Tensor:
    """Return a vector (C,) or (N, C) in a shape that broadcasts to (N, C, H, W)."""
    return vector[..., None, None]


def _images_as_channels(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.reshape(1, n * c, h, w)


def _affine(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    if scale.dim() == 2:
        if x.is_contiguous():
            y = _affine_kernel(_images_as_channels(x), scale.flatten(), shift.flatten())
            # Nothing else holds y. A view from a custom function forbids an in-place ReLU behind it.
            return aten._unsafe_view(y, x.shape)
        return torch.addcmul(broadcast(shift), x, broadcast(scale), out=torch.empty_like(x))
    if _is_full_precision_on_cpu(x) and not x.is_contiguous():
        # Twice as fast in channels-last.
        return torch.addcmul(broadcast(shift), x, broadcast(scale))
    return _affine_kernel(x, scale, shift)


def _affine_kernel(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    mean, var = _standard(x)
    return torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, 0.0)[0]


def _product_sums(dy: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # They are the gradients of weight and bias in x * weight + bias. CUDA's kernel needs all of its
    # tensors: it takes the dtype of the gradients from `weight`, and asserts `save_mean`,
    # `save_invstd`.
    zeros, ones = _standard(x)
    return aten.native_batch_norm_backward(
        dy, x, ones, zeros, ones, zeros, ones, False, 0.0, [False, True, True]
    )[1:]


def _is_full_precision_on_cpu(x: torch.Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu"


def _standard(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean (zeros) and variance (ones), (C,) each, that leave x as it is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    zeros = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
    return zeros, torch.ones_like(zeros)
