r"""MABN's operators on a GPU, in Triton: for a CUDA tensor what `csrc` is for one on a CPU.

`mabn` is a whole layer, `normalize` and its gradient `normalize_backward`, three launches each: a pass
of sums, one program that makes the per-channel vectors of them and moves the state, a pass that writes the
result. `affine`, `combine` and `product_sums` are the passes alone. Each reads its inputs once.

Nothing synchronizes, and nothing is tuned by trial, so that a CUDA graph can capture all of it.
There are no atomics: sums leave partial results, which are added in one order. Sizes are arguments
at run time; tiles, formats and the like are constants (`CAPITALS`), each combination of which is
compiled once.

Activations are (N, C, H, W), contiguous or channels-last, not empty, float32, float16 or bfloat16;
arithmetic and vectors are float32. In kernels HW means H * W, and a plane is one image's channel.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Sequence
from typing import Any

import torch

from .memory_format import dense_like

NAME = "Triton"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# A program of 4 warps has 16 elements a thread: two vectors of 16 bytes in half precision, four in
# full.
TILE = 2048
# Channels of a tile in channels-last. Sums take few, for the more programs at the same number of
# partial sums; 32 of them are still whole sectors of memory.
WIDE_CHANNELS, SUMS_CHANNELS = 256, 32
# Programs of a pass of sums: 16 for each of an H100's multiprocessors, their 2048 threads.
PROGRAMS = 132 * 16
# At most so many partial sums of a kind: one program adds them, a tile of FINISH_TILE at a time.
PARTIALS = 32768
FINISH_TILE, FINISH_CHANNELS, FINISH_WARPS = 16384, 1024, 16
# From here on offsets are computed in 64 bits. Far below 2^31: masked lanes lie beyond the tensor.
WIDE = 2**30


@functools.cache
def unavailable() -> str | None:
    """Return why this installation cannot use Triton, or None if it can.

    Triton needs a C compiler and Python.h, beside itself.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if compiler is None:
        return "Triton needs a C compiler"
    return None if os.path.exists(header) else "Triton needs Python.h, the headers of Python"


if unavailable() is None:
    import triton
    import triton.language as tl

    jit = triton.jit
else:

    def jit(kernel=None, **options):
        """Leave the kernels uncompiled: nothing calls them."""
        return kernel if kernel else lambda kernel: kernel


def unsupported(*tensors: torch.Tensor, split_batch: bool = False) -> str | None:
    """Return why the backend cannot take activations, vectors and windows like these, or None.

    Args:
        tensors: the activation first, dense and not empty.
        split_batch: whether `mabn` is wanted with a batch_size.
    """
    device = tensors[0].device
    if split_batch:
        return "Triton has no kernels for the split form"
    for x in tensors:
        if not x.is_cuda or x.device != device:
            return f"a tensor is on {x.device}"
        if x.dtype not in DTYPES:
            return f"the Triton kernels have no {x.dtype}".replace("torch.", "")
        if not _is_dense(x):
            return "a tensor is neither contiguous nor channels-last"
    if not _is_recent(device):
        return "the Triton kernels need compute capability 8.0"
    return None


def _is_dense(x):
    return x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )


@functools.cache
def _is_recent(device):
    return torch.cuda.get_device_capability(device) >= (8, 0)  # bfloat16 is


# Elementwise passes.


@jit
def _place(
    size,
    C,
    HW,
    CHANNELS_LAST: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    SMALL: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Return a program's tile: offsets, their mask, and the index of their factors with its mask.

    Contiguous tensors are looked at as one row: tiles start at multiples of TILE whatever HW is, so
    that accesses are vectors. Where a plane is no smaller than a tile, a tile meets two planes at
    most: then the index is that of the first, a scalar, its mask is that of the second plane's
    elements, and the last result is the index of the second.
    """
    pid = tl.program_id(0)
    if CHANNELS_LAST:
        blocks = tl.cdiv(C, TILE_C)
        row = pid // blocks
        if WIDE:
            row = row.to(tl.int64)
        row = row * (TILE // TILE_C) + tl.arange(0, TILE // TILE_C)
        channel = (pid % blocks) * TILE_C + tl.arange(0, TILE_C)[None, :]
        chosen = channel < C
        offsets = row[:, None] * C + channel
        mask = chosen & (offsets < size)
        index = channel
        if PER_IMAGE:
            index = (row // HW)[:, None] * C + channel
            chosen = mask
        following = index
    else:
        if WIDE:
            pid = pid.to(tl.int64)
        start = pid * TILE
        offsets = start + tl.arange(0, TILE)
        mask = offsets < size
        first = start // HW  # plane of the first element
        inside = (start - first * HW).to(tl.int32) + tl.arange(0, TILE)
        if SMALL:
            # Planes since the first. Division by way of float is exact for such small numbers.
            index = ((inside + 0.5) * (1.0 / HW)).to(tl.int32)
            if PER_IMAGE:
                index += first
            else:
                index += first % C
                index -= ((index + 0.5) * (1.0 / C)).to(tl.int32) * C
            chosen = mask
            following = index
        else:
            chosen = inside >= HW
            last = (size - 1) // HW
            following = tl.minimum(first + 1, last)
            index = first
            if not PER_IMAGE:
                index = index % C
                following = following % C
    return offsets, mask, index, chosen, following


@jit
def _factor(vector, index, chosen, following, TWO_PLANES: tl.constexpr):
    """Return a factor for each element of a tile, or something that broadcasts to it."""
    if TWO_PLANES:
        second = tl.load(vector + following).to(tl.float32)
        value = tl.where(chosen, second, tl.load(vector + index).to(tl.float32))
    else:
        value = tl.load(vector + index, mask=chosen, other=0.0).to(tl.float32)
    return value


@jit(do_not_specialize=["HW"])
def _affine(
    x,
    scale,
    shift,
    y,
    size,
    C,
    HW,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    SMALL: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_C: tl.constexpr,
):
    offsets, mask, index, chosen, following = _place(
        size, C, HW, CHANNELS_LAST, PER_IMAGE, SMALL, WIDE, TILE, TILE_C
    )
    TWO_PLANES: tl.constexpr = not (CHANNELS_LAST or SMALL)
    a = _factor(scale, index, chosen, following, TWO_PLANES)
    b = _factor(shift, index, chosen, following, TWO_PLANES)
    value = a * tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) + b
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN passes, as through torch's ReLU
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["HW"])
def _combine(
    dy,
    x,
    dy_scale,
    scale,
    shift,
    relu_shift,
    dx,
    size,
    C,
    HW,
    CHANNELS_LAST: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    SMALL: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_C: tl.constexpr,
):
    offsets, mask, index, chosen, following = _place(
        size, C, HW, CHANNELS_LAST, PER_IMAGE, SMALL, WIDE, TILE, TILE_C
    )
    TWO_PLANES: tl.constexpr = not (CHANNELS_LAST or SMALL)
    p = _factor(dy_scale, index, chosen, following, TWO_PLANES)
    q = _factor(scale, index, chosen, following, TWO_PLANES)
    g = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if relu_shift is not None:
        b = _factor(relu_shift, index, chosen, following, TWO_PLANES)
        g = tl.where(p * value + b <= 0, 0.0, g)
    result = p * g + q * value
    if shift is not None:
        result += _factor(shift, index, chosen, following, TWO_PLANES)
    tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)


# Sums.


@jit(do_not_specialize=["N", "HW", "images", "pixels", "parts", "slack", "factor_stride"])
def _sums(
    dy,
    x,
    relu_scale,
    relu_shift,
    partial,
    N,
    C,
    HW,
    images,
    pixels,
    parts,
    slack,
    factor_stride,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """partial (2, rows, C) <- sums of dy * x and dy; of x * x alone, (1, rows, C), if dy is None.

    A program takes TILE_C channels, `images` images and `pixels` pixels of each, in tiles of
    (TILE_C, TILE_P); a row of `partial` is the sums over one such group of images and pixels, of
    which there are `parts` an image. Contiguous planes begin anywhere: a tile begins at the
    multiple of ALIGN before, so that loads are vectors, and leaves its neighbours' elements out of
    the sums; `slack` is the most that this adds to the pixels.
    """
    blocks = tl.cdiv(C, TILE_C)
    row = tl.program_id(0) // blocks
    rows = tl.num_programs(0) // blocks
    channel = (tl.program_id(0) % blocks) * TILE_C + tl.arange(0, TILE_C)
    pixel = tl.arange(0, TILE_P)
    if WIDE:
        channel, pixel = channel.to(tl.int64), pixel.to(tl.int64)
    inside = channel < C
    first_image = (row // parts) * images
    first_pixel = (row % parts) * pixels
    count = tl.minimum(pixels, HW - first_pixel)
    products = tl.zeros([TILE_C, TILE_P], tl.float32)
    totals = tl.zeros([TILE_C, TILE_P], tl.float32)
    for image in range(first_image, tl.minimum(first_image + images, N)):
        if relu_scale is not None:
            factor = image * factor_stride + channel
            a = tl.load(relu_scale + factor, mask=inside, other=0.0).to(tl.float32)[:, None]
            b = tl.load(relu_shift + factor, mask=inside, other=0.0).to(tl.float32)[:, None]
        for step in range(0, count + slack, TILE_P):
            if CHANNELS_LAST:
                place = image * HW + first_pixel + step + pixel
                offsets = place[None, :] * C + channel[:, None]
                mask = inside[:, None] & (step + pixel < count)[None, :]
            else:
                begin = (image * C + channel) * HW + first_pixel
                end = begin + count
                offsets = (begin // ALIGN * ALIGN)[:, None] + (step + pixel)[None, :]
                limit = tl.cdiv(end, ALIGN) * ALIGN
                mask = inside[:, None] & (offsets < limit[:, None])
            value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
            if dy is not None:
                g = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
            if not CHANNELS_LAST and ALIGN > 1:
                own = (offsets >= begin[:, None]) & (offsets < end[:, None])
                value = tl.where(own, value, 0.0)
                if dy is not None:
                    g = tl.where(own, g, 0.0)
            if dy is None:
                products += value * value
            else:
                if relu_scale is not None:
                    g = tl.where(a * value + b <= 0, 0.0, g)
                products += g * value
                totals += g
    tl.store(partial + row * C + channel, tl.sum(products, axis=1), mask=inside)
    if dy is not None:
        tl.store(partial + (rows + row) * C + channel, tl.sum(totals, axis=1), mask=inside)


# Per-channel vectors, in one program: whether an input is accepted is a matter of all channels.
# What one thread reads and another writes is separated by a barrier.


@jit
def _sum_rows(matrix, column, inside, rows, C, skip, TILE_C: tl.constexpr, TILE_ROWS: tl.constexpr):
    """Return the sums of a tile of columns of a matrix (rows, C), the row `skip` left out."""
    sums = tl.zeros([TILE_ROWS, TILE_C], tl.float32)
    for first in range(0, rows, TILE_ROWS):
        row = first + tl.arange(0, TILE_ROWS)
        mask = ((row < rows) & (row != skip))[:, None] & inside[None, :]
        sums += tl.load(matrix + row[:, None] * C + column[None, :], mask=mask, other=0.0)
    return tl.sum(sums, axis=0)


@jit
def _all_finite(vector):
    """Return 1 if all elements are finite, else 0."""
    return tl.min((tl.abs(vector) < float("inf")).to(tl.int32), axis=0)


@jit(do_not_specialize=["rows", "m", "batch_stats_iters", "no_renorm_iters"])
def _finish_forward(
    partial,
    weight,
    window,
    running_var,
    iters,
    rejected,
    vectors,
    slots,
    flags,
    rows,
    C,
    m,
    count,
    eps,
    new_share,
    batch_stats_iters,
    no_renorm_iters,
    low,
    high,
    UPDATE_STATE: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """`functional.advance` and what its result scales by, from partial sums of squares (rows, C).

    vectors (6, C) <- x2, var, r, var + eps, r_std, scale; slots (1,) <- slot; flags (2,) <- use_batch_stats,
    counted.
    """
    t = tl.load(iters) + 1
    refused = tl.load(rejected)
    finite = 1
    for start in range(0, C, TILE_C):
        channel = start + tl.arange(0, TILE_C)
        inside = channel < C
        x2 = _sum_rows(partial, channel, inside, rows, C, -1, TILE_C, TILE_ROWS) / count
        tl.store(vectors + channel, x2, mask=inside)
        finite = tl.minimum(finite, _all_finite(x2))
    accepted = finite != 0
    slot = t % m
    use_batch_stats = t <= batch_stats_iters
    skip = tl.where(accepted, slot, -1)
    tl.debug_barrier()
    for start in range(0, C, TILE_C):
        channel = start + tl.arange(0, TILE_C)
        inside = channel < C
        x2 = tl.load(vectors + channel, mask=inside, other=0.0)
        before = tl.load(running_var + channel, mask=inside, other=0.0)
        w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        others = _sum_rows(window, channel, inside, m, C, skip, TILE_C, TILE_ROWS)
        mean = (others + tl.where(accepted, x2, 0.0)) / m
        var = tl.where(use_batch_stats, x2, mean)
        r = tl.sqrt((var + eps) / (before + eps))
        r = tl.where(r < low, low, tl.where(r > high, high, r))  # NaN passes, as through clamp
        r = tl.where(t <= no_renorm_iters, 1.0, r)
        r_std = r * tl.rsqrt(var + eps)
        tl.debug_barrier()
        tl.store(vectors + C + channel, var, mask=inside)
        tl.store(vectors + 2 * C + channel, r, mask=inside)
        tl.store(vectors + 3 * C + channel, var + eps, mask=inside)
        tl.store(vectors + 4 * C + channel, r_std, mask=inside)
        tl.store(vectors + 5 * C + channel, r_std * w, mask=inside)
        if UPDATE_STATE:
            enters = inside & accepted
            tl.store(window + slot * C + channel, x2, mask=enters)
            tl.store(running_var + channel, before + new_share * (var - before), mask=enters)
    tl.store(slots, slot)
    tl.store(flags, use_batch_stats)
    tl.store(flags + 1, UPDATE_STATE)
    if UPDATE_STATE:
        tl.store(iters, tl.where(accepted, t, t - 1))
        tl.store(rejected, tl.where(accepted, refused, refused + 1))


@jit(do_not_specialize=["rows", "m"])
def _finish_backward(
    partial,
    scale,
    var,
    r_std,
    window,
    slots,
    flags,
    vectors,
    rows,
    C,
    m,
    count,
    TILE_C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """The backward's psi and what is made of it, from partial sums of dy * x and dy (2, rows, C).

    vectors (3, C) <- the factor of x in dx, dweight, dbias.
    """
    slot = tl.load(slots)
    use_batch_stats = tl.load(flags)
    finite = 1
    for start in range(0, C, TILE_C):
        channel = start + tl.arange(0, TILE_C)
        inside = channel < C
        dyx = _sum_rows(partial, channel, inside, rows, C, -1, TILE_C, TILE_ROWS)
        dbias = _sum_rows(partial + rows * C, channel, inside, rows, C, -1, TILE_C, TILE_ROWS)
        psi = dyx * tl.load(scale + channel, mask=inside, other=0.0) / count
        dweight = dyx * tl.load(r_std + channel, mask=inside, other=0.0)
        tl.store(vectors + channel, psi, mask=inside)
        tl.store(vectors + C + channel, dweight, mask=inside)
        tl.store(vectors + 2 * C + channel, dbias, mask=inside)
        finite = tl.minimum(finite, _all_finite(psi))
    accepted = finite != 0
    skip = tl.where(accepted, slot, -1)
    tl.debug_barrier()
    for start in range(0, C, TILE_C):
        channel = start + tl.arange(0, TILE_C)
        inside = channel < C
        psi = tl.load(vectors + channel, mask=inside, other=0.0)
        others = _sum_rows(window, channel, inside, m, C, skip, TILE_C, TILE_ROWS)
        mean = (others + tl.where(accepted, psi, 0.0)) / m
        chosen = tl.where(use_batch_stats, psi, mean)
        factor = -chosen / tl.load(var + channel, mask=inside, other=1.0)
        tl.debug_barrier()
        tl.store(vectors + channel, factor, mask=inside)
        tl.store(window + slot * C + channel, psi, mask=inside & accepted)


# Launches.


def _launch(kernel, programs, device_of, *arguments, **constants):
    with torch.cuda.device_of(device_of):  # nothing, for a tensor on a CPU
        kernel[(programs,)](*arguments, **constants)


def _divide_up(a, b):
    return -(-a // b)


def _power_of_two(n):
    """Return the least power of two that is not less than n."""
    return 1 << (n - 1).bit_length()


def _layout(x, *others):
    """Return N, C, H * W and whether to look at x as channels-last; the others must be like x."""
    n, c, h, w = x.shape
    channels_last = not x.is_contiguous()
    if channels_last and not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"expected contiguous or channels-last, got strides {x.stride()}")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for other in others:
        if (other.shape, other.dtype) != (x.shape, x.dtype) or not other.is_contiguous(
            memory_format=memory_format
        ):
            raise ValueError("expected two tensors of the same shape, dtype and memory format")
    return n, c, h * w, channels_last or h * w == 1


def _per_image(x, vectors):
    """Return whether any of the factors has a row for each image, and all in the form of that."""
    rows = any(v is not None and v.dim() == 2 for v in vectors)
    if rows:
        shape = x.shape[:2]
        vectors = [v if v is None else v.expand(shape).contiguous() for v in vectors]
    return rows, vectors


def _elementwise(x, layout, per_image):
    """Return the number of programs of an elementwise pass, its sizes and its constants."""
    n, c, hw, channels_last = layout
    size = x.numel()
    tile_c = min(_power_of_two(c), WIDE_CHANNELS)
    if channels_last:
        programs = _divide_up(n * hw, TILE // tile_c) * _divide_up(c, tile_c)
    else:
        programs = _divide_up(size, TILE)
    constants = {
        "CHANNELS_LAST": channels_last,
        "PER_IMAGE": per_image,
        "SMALL": hw < TILE and not channels_last,
        "WIDE": size >= WIDE,
        "TILE": TILE,
        "TILE_C": tile_c if channels_last else 1,
    }
    return programs, (size, c, hw), constants


def affine(x, scale, shift, relu=False):
    """Return scale * x + shift, or its ReLU, in the dtype and memory format of x.

    Args:
        scale, shift: (C,), or (N, C) with a row for each image; here and below.
    """
    layout = _layout(x)
    per_image, (scale, shift) = _per_image(x, (scale, shift))
    programs, sizes, constants = _elementwise(x, layout, per_image)
    y = torch.empty_like(x)
    _launch(_affine, programs, x, x, scale, shift, y, *sizes, RELU=relu, **constants)
    return y


def combine(dy, x, dy_scale, scale, shift=None, relu_shift=None):
    """Return dy_scale * g + scale * x + shift in the dtype and memory format of x.

    g is dy or, with relu_shift, dy behind relu(dy_scale * x + relu_shift).
    """
    layout = _layout(x, dy)
    per_image, factors = _per_image(x, (dy_scale, scale, shift, relu_shift))
    programs, sizes, constants = _elementwise(x, layout, per_image)
    dx = torch.empty_like(x)
    _launch(_combine, programs, x, dy, x, *factors, dx, *sizes, **constants)
    return dx


def _partial_sums(dy, x, per_image=False, relu_scale=None, relu_shift=None):
    """Return partial sums (2, rows, C) of g * x and g, or with dy None (1, rows, C) of x * x.

    With per_image each image has its rows, the same number, in order.
    """
    n, c, hw, channels_last = _layout(x) if dy is None else _layout(x, dy)
    factor_rows, (relu_scale, relu_shift) = _per_image(x, (relu_scale, relu_shift))
    align, slack = 1, 0
    if channels_last:
        if not (per_image or factor_rows):
            n, hw = 1, n * hw
        tile_c = min(_power_of_two(c), SUMS_CHANNELS)
        tile_p = TILE // tile_c
    else:
        vector = 16 // x.element_size()
        if x.numel() % vector == 0:
            align = vector
            slack = vector - 1 if hw % vector else 0
        tile_p = min(max(_power_of_two(hw + slack), 16), TILE)
        tile_c = min(_power_of_two(c), TILE // tile_p)
    blocks = _divide_up(c, tile_c)
    rows = max(1, min(PROGRAMS // blocks, PARTIALS // c))
    images = 1 if per_image else _divide_up(n, rows)
    tiles = _divide_up(hw + slack, tile_p)
    parts = max(1, min(tiles, rows // n))
    pixels = _divide_up(tiles, parts) * tile_p - slack
    parts = _divide_up(hw, pixels)
    rows = _divide_up(n, images) * parts
    kinds = 1 if dy is None else 2
    partial = torch.empty(kinds, rows, c, dtype=torch.float32, device=x.device)
    _launch(
        _sums,
        rows * blocks,
        x,
        dy,
        x,
        relu_scale,
        relu_shift,
        partial,
        n,
        c,
        hw,
        images,
        pixels,
        parts,
        slack,
        c if factor_rows else 0,
        CHANNELS_LAST=channels_last,
        ALIGN=align,
        WIDE=x.numel() >= WIDE,
        TILE_P=tile_p,
        TILE_C=tile_c,
    )
    return partial


def product_sums(dy, x, per_image=False, relu_scale=None, relu_shift=None):
    """Return sum(g * x) and sum(g) over H, W, and over N unless per_image: (C,) or (N, C) each.

    g is dy or, with relu_scale and relu_shift, dy behind relu(relu_scale * x + relu_shift).
    """
    partial = _partial_sums(dy, x, per_image, relu_scale, relu_shift)
    if per_image:
        partial = partial.view(2, x.shape[0], -1, x.shape[1])
    return partial.sum(-2).unbind()


def square_sums(x, per_image=False):
    """Return sum(x^2) over H, W, and over N unless per_image: (C,) or (N, C)."""
    partial = _partial_sums(None, x, per_image)[0]
    if per_image:
        return partial.view(x.shape[0], -1, x.shape[1]).sum(1)
    return partial.sum(0)


def _finish(channels):
    """Return the constants of the kernels that finish."""
    tile_c = min(max(_power_of_two(channels), 32), FINISH_CHANNELS)
    return {"TILE_C": tile_c, "TILE_ROWS": FINISH_TILE // tile_c, "num_warps": FINISH_WARPS}


def normalize(
    x,
    weight,
    bias,
    window,
    running_var,
    iters,
    rejected,
    eps,
    momentum,
    batch_stats_iters,
    no_renorm_iters,
    clip_limit,
    update_state,
    relu,
):
    """The forward of a layer; if `update_state`, it moves the state, in place.

    Args:
        weight, bias: (C,).
        window, running_var, iters, rejected: the layer's state, (m, C), (C,), (1,), (1,).
        eps to relu: see `torch_ops.mabn`.

    Returns:
        y, like x; the fields of `Statistics`: x2, var, r, slot, use_batch_stats, counted; and what
        `normalize_backward` takes: var + eps, r_std and scale, (C,) each.
    """
    c, m = x.shape[1], window.shape[0]
    partial = _partial_sums(None, x)
    vectors = torch.empty(6, c, dtype=torch.float32, device=x.device)
    slot = torch.empty_like(iters)
    flags = torch.empty(2, 1, dtype=torch.bool, device=x.device)
    _launch(
        _finish_forward,
        1,
        x,
        partial,
        weight,
        window,
        running_var,
        iters,
        rejected,
        vectors,
        slot,
        flags,
        partial.shape[1],
        c,
        m,
        float(x.numel() // c),
        eps,
        1 - momentum,
        batch_stats_iters,
        no_renorm_iters,
        1 / clip_limit,
        clip_limit,
        UPDATE_STATE=update_state,
        **_finish(c),
    )
    x2, var, r, shifted, r_std, scale = vectors.unbind()
    use_batch_stats, counted = flags.unbind()
    return (
        affine(x, scale, bias, relu),
        x2,
        var,
        r,
        slot,
        use_batch_stats,
        counted,
        shifted,
        r_std,
        scale,
    )


def normalize_backward(
    dy, x, scale, relu_shift, var, r_std, psi_window, slot, use_batch_stats, needs_dx=True
):
    """The backward of a layer; psi enters the window unless it is not finite.

    Args:
        dy: like x.
        scale, var, r_std: of the forward, var with eps.
        relu_shift: (C,) the bias if there is a ReLU, else None.
        psi_window, slot, use_batch_stats: (m, C), and the forward's (1,) int64 and (1,) bool.

    Returns:
        dx, None unless needs_dx; dweight and dbias (C,), float32.
    """
    c = x.shape[1]
    relu_scale = None if relu_shift is None else scale
    partial = _partial_sums(dy, x, False, relu_scale, relu_shift)
    vectors = torch.empty(3, c, dtype=torch.float32, device=x.device)
    _launch(
        _finish_backward,
        1,
        x,
        partial,
        scale,
        var,
        r_std,
        psi_window,
        slot,
        use_batch_stats,
        vectors,
        partial.shape[1],
        c,
        psi_window.shape[0],
        float(x.numel() // c),
        **_finish(c),
    )
    factor, dweight, dbias = vectors.unbind()
    dx = combine(dy, x, scale, factor, None, relu_shift) if needs_dx else None
    return dx, dweight, dbias


class _MABN(torch.autograd.Function):
    """A layer: `normalize`, or in its place what `given` makes of statistics that are given."""

    @staticmethod
    def forward(ctx, x, weight, bias, psi_window, given, *arguments):
        ctx.dtypes = weight.dtype, bias.dtype
        ctx.count = 5 + len(arguments)
        weight, bias = weight.float(), bias.float()
        run = _normalize_given if given else normalize
        y, *statistics, var, r_std, scale = run(x, weight, bias, *arguments)
        slot, use_batch_stats = statistics[3:5]
        relu = arguments[-1]
        # Every backend saves these, in this order: see `torch_ops.mabn_given`.
        ctx.save_for_backward(x, scale, bias if relu else None, var, r_std, slot, use_batch_stats)
        # The backward writes to it, which the checks of save_for_backward forbid.
        ctx.psi_window = psi_window
        ctx.set_materialize_grads(False)
        if given:
            return y
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * ctx.count
        x, scale, shift, var, r_std, slot, use_batch_stats = ctx.saved_tensors
        dx, dweight, dbias = normalize_backward(
            dense_like(dy, x),
            x,
            scale,
            shift,
            var,
            r_std,
            ctx.psi_window,
            slot,
            use_batch_stats,
            ctx.needs_input_grad[0],
        )
        weight_dtype, bias_dtype = ctx.dtypes
        return dx, dweight.to(weight_dtype), dbias.to(bias_dtype), *(None,) * (ctx.count - 3)


def _normalize_given(x, weight, bias, var, r, slot, use_batch_stats, eps, relu):
    """Return what `normalize` does, for statistics that are given."""
    shifted = var + eps
    r_std = r * shifted.rsqrt()
    scale = r_std * weight
    y = affine(x, scale, bias, relu)
    return y, None, var, r, slot, use_batch_stats, None, shifted, r_std, scale


def mabn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    psi_window: torch.Tensor,
    window: torch.Tensor,
    *arguments: Any,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """See `torch_ops.mabn`; batch_size, the last of the arguments, is 0."""
    *arguments, batch_size = arguments
    if batch_size:
        raise ValueError("the split form has no Triton kernels")
    y, *statistics = _MABN.apply(x, weight, bias, psi_window, False, window, *arguments)
    return y, statistics


def mabn_given(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    psi_window: torch.Tensor,
    *arguments: Any,
) -> torch.Tensor:
    """See `torch_ops.mabn_given`; batch_size, the last of the arguments, is 0."""
    return _MABN.apply(x, weight, bias, psi_window, True, *arguments[:-1])
