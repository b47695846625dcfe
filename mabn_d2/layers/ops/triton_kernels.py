"""The Triton kernels of MABN: passes over activations, and the per-channel work between them.

`triton_ops.py` launches them. The kernels are, in the order of a layer's forward and backward:

- `forward_sums`: sums of x * x. Its last program makes the per-channel vectors and moves the state.
- `affine`: y = scale * x + shift, with a ReLU.
- `backward_sums`: sums of dy * x and dy. Its last program makes the gradients of weight and bias and
  the factor of x in dx, and moves the window of psi.
- `combine`: dx = scale * dy + factor * x, behind a ReLU.
- `advance_groups` and `push_groups`: the per-channel work of the split form, between the sums and the
  elementwise pass, where one program would take too long.
- `sums`: the partial sums alone.

An input is G groups of B consecutive images. The ordinary form has one group, the whole input; the
split form has one for each normalization batch. Per-channel vectors have one row for each group.

Activations are (N, C, H, W), contiguous or channels-last, in float32, float16 or bfloat16; arithmetic
and vectors are float32. HW means H * W, and a plane is one image's channel. Sizes are arguments at run
time. Tiles, formats and settings are constants (`CAPITALS`); each combination is compiled once.

There are no floating-point atomics: partial sums are stored and then added in one order, so results
are the same in every run.
"""

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from typing import Any

import torch


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


# Every size is passed as it is: Triton's own specialization of 1 and of multiples of 16 would compile
# a kernel again for sizes that only happen to be such numbers. ALIGN tells what vectors need.
SIZES = ["N", "C", "HW", "B", "images", "pixels", "parts", "chunks", "slack", "groups", "m"]


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a kernel that is launched, once for all values of its sizes (SIZES)."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return jit(function, do_not_specialize=[name for name in SIZES if name in names])


# ------------------------------------------------------------------ elementwise passes


@jit
def _place(
    N,
    C,
    HW,
    B,
    CHANNELS_LAST: tl.constexpr,
    GROUPED: tl.constexpr,
    SMALL: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Return a program's tile: offsets, their mask, and the index of their factors with its mask.

    A contiguous tensor is treated as one row: tiles start at multiples of TILE for any HW, so that
    accesses are vectors. If a plane is no smaller than a tile, a tile meets two planes at most. Then
    the index is that of the first plane, a scalar; its mask is that of the second plane's elements;
    and the last result is the index of the second plane.
    """
    pid = tl.program_id(0)
    if WIDE:
        N = N.to(tl.int64)
    if CHANNELS_LAST:
        C = C // ALIGN * ALIGN  # tells the compiler that C is a multiple of ALIGN
        size = N * HW * C
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
        if GROUPED:
            index = (row // (HW * B))[:, None] * C + channel
            chosen = mask
        following = index
    else:
        if WIDE:
            pid = pid.to(tl.int64)
        size = N * HW * C // ALIGN * ALIGN
        start = pid * TILE
        offsets = start + tl.arange(0, TILE)
        mask = offsets < size
        first = start // HW  # plane of the first element
        inside = (start - first * HW).to(tl.int32) + tl.arange(0, TILE)
        if SMALL:
            # Planes and images since the first. Division by way of float is exact for such small
            # numbers.
            planes = ((inside + 0.5) * (1.0 / HW)).to(tl.int32)
            index = planes + (first % C).to(tl.int32)
            passed = ((index + 0.5) * (1.0 / C)).to(tl.int32)
            index -= passed * C
            if GROUPED:
                image = first // C
                since = passed + (image % B).to(tl.int32)
                index += ((image // B).to(tl.int32) + ((since + 0.5) * (1.0 / B)).to(tl.int32)) * C
            chosen = mask
            following = index
        else:
            chosen = inside >= HW
            second = tl.minimum(first + 1, (size - 1) // HW)
            index = first % C
            following = second % C
            if GROUPED:
                index += first // C // B * C
                following += second // C // B * C
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


@kernel
def affine(
    x,
    scale,
    shift,
    y,
    N,
    C,
    HW,
    B,
    groups,
    SCALE_ROW: tl.constexpr,
    SHIFT_ROW: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUPED: tl.constexpr,
    SMALL: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """y <- scale * x + shift, or its ReLU. The factors begin at a row of (rows, groups, C)."""
    offsets, mask, index, chosen, following = _place(
        N, C, HW, B, CHANNELS_LAST, GROUPED, SMALL, ALIGN, WIDE, TILE, TILE_C
    )
    TWO_PLANES: tl.constexpr = not (CHANNELS_LAST or SMALL)
    a = _factor(scale + SCALE_ROW * groups * C, index, chosen, following, TWO_PLANES)
    b = _factor(shift + SHIFT_ROW * groups * C, index, chosen, following, TWO_PLANES)
    value = a * tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) + b
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN passes, as through torch's ReLU
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


@kernel
def combine(
    dy,
    x,
    dy_scale,
    scale,
    shift,
    relu_shift,
    dx,
    N,
    C,
    HW,
    B,
    groups,
    DY_SCALE_ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    RELU_SHIFT_ROW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUPED: tl.constexpr,
    SMALL: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """dx <- dy_scale * g + scale * x + shift. The factors begin at a row of (rows, groups, C).

    g is dy or, with relu_shift, dy behind relu(dy_scale * x + relu_shift).
    """
    offsets, mask, index, chosen, following = _place(
        N, C, HW, B, CHANNELS_LAST, GROUPED, SMALL, ALIGN, WIDE, TILE, TILE_C
    )
    TWO_PLANES: tl.constexpr = not (CHANNELS_LAST or SMALL)
    p = _factor(dy_scale + DY_SCALE_ROW * groups * C, index, chosen, following, TWO_PLANES)
    q = _factor(scale + SCALE_ROW * groups * C, index, chosen, following, TWO_PLANES)
    g = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if relu_shift is not None:
        b = _factor(relu_shift + RELU_SHIFT_ROW * groups * C, index, chosen, following, TWO_PLANES)
        g = tl.where(p * value + b <= 0, 0.0, g)
    result = p * g + q * value
    if shift is not None:
        result += _factor(shift, index, chosen, following, TWO_PLANES)
    tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------ sums


@jit
def _partial_sums(
    dy,
    x,
    relu_scale,
    relu_shift,
    partial,
    N,
    C,
    HW,
    B,
    images,
    pixels,
    parts,
    chunks,
    slack,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """partial (2, rows, C) <- sums of dy * x and dy; of x * x alone, (1, rows, C), if dy is None.

    A program takes TILE_C channels, `images` images of one group and `pixels` pixels of each, in
    tiles of (TILE_C, TILE_P). A row of `partial` is the sums over one such set of images and pixels;
    a group has `chunks` sets of images with `parts` sets of pixels each, in order. Contiguous planes
    begin anywhere: a tile begins at the multiple of ALIGN before, so that loads are vectors, and
    leaves its neighbours' elements out of the sums; `slack` is the most that this adds to the pixels.
    """
    blocks = tl.cdiv(C, TILE_C)
    row = tl.program_id(0) // blocks
    rows = tl.num_programs(0) // blocks
    group = row // (chunks * parts)
    chunk = row % (chunks * parts) // parts
    channel = (tl.program_id(0) % blocks) * TILE_C + tl.arange(0, TILE_C)
    inside = channel < C
    if relu_scale is not None:
        factor = group * C + channel
        a = tl.load(relu_scale + factor, mask=inside, other=0.0).to(tl.float32)[:, None]
        b = tl.load(relu_shift + factor, mask=inside, other=0.0).to(tl.float32)[:, None]
    pixel = tl.arange(0, TILE_P)
    if WIDE:
        channel, pixel = channel.to(tl.int64), pixel.to(tl.int64)
    begin_image = group * B + chunk * images
    end_image = tl.minimum(tl.minimum(begin_image + images, group * B + B), N)
    first_pixel = (row % parts) * pixels
    count = tl.minimum(pixels, HW - first_pixel)
    if CHANNELS_LAST:
        stride = C // ALIGN * ALIGN  # tells the compiler that C is a multiple of ALIGN
        inside = channel < stride
    products = tl.zeros([TILE_C, TILE_P], tl.float32)
    totals = tl.zeros([TILE_C, TILE_P], tl.float32)
    for image in range(begin_image, end_image):
        for step in range(0, count + slack, TILE_P):
            if CHANNELS_LAST:
                place = image * HW + first_pixel + step + pixel
                offsets = place[None, :] * stride + channel[:, None]
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


@kernel
def sums(
    dy,
    x,
    relu_scale,
    relu_shift,
    partial,
    N,
    C,
    HW,
    B,
    images,
    pixels,
    parts,
    chunks,
    slack,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """`_partial_sums` alone."""
    _partial_sums(
        dy,
        x,
        relu_scale,
        relu_shift,
        partial,
        N,
        C,
        HW,
        B,
        images,
        pixels,
        parts,
        chunks,
        slack,
        CHANNELS_LAST,
        ALIGN,
        WIDE,
        TILE_P,
        TILE_C,
    )


# ------------------------------------------------------------------ per-channel vectors
#
# The program that stores the last partial sums of a block of channels adds them; the one that
# finishes the last block goes on, because whether an input is accepted is a matter of all channels.
# Which programs these are differs from run to run, what they compute does not. `counters` is zero
# before and after each launch: (1 + blocks,), for the finished blocks and for each block's rows.
# An atomic of acq_rel makes what was written before it, in the programs that came first, visible to
# the program that comes last. A barrier separates what threads of one program write and read.


@jit
def _count_in(counter, value):
    """Add to a counter after all writes of this program; return what it held before."""
    tl.debug_barrier()
    before = tl.atomic_add(counter, value, sem="acq_rel")
    tl.debug_barrier()
    return before


@jit
def _sum_rows(matrix, column, inside, rows, C, skip, TILE_C: tl.constexpr, TILE_ROWS: tl.constexpr):
    """Return the sums of a tile of columns of a matrix (rows, C), the row `skip` left out."""
    total = tl.zeros([TILE_ROWS, TILE_C], tl.float32)
    for first in range(0, rows, TILE_ROWS):
        row = first + tl.arange(0, TILE_ROWS)
        mask = ((row < rows) & (row != skip))[:, None] & inside[None, :]
        total += tl.load(matrix + row[:, None] * C + column[None, :], mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@jit
def _is_finite(vector):
    """Return 1 for each finite element, 0 for each other."""
    return (tl.abs(vector) < float("inf")).to(tl.int32)


@jit
def _renorm(var, before, EPS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, no_renorm):
    """Return r = sqrt((var + eps) / (before + eps)) within [LOW, HIGH], or 1 if `no_renorm`."""
    r = tl.sqrt((var + EPS) / (before + EPS))
    r = tl.where(r < LOW, LOW, tl.where(r > HIGH, HIGH, r))  # NaN passes, as through clamp
    return tl.where(no_renorm, 1.0, r)


@kernel
def forward_sums(
    x,
    weight,
    bias,
    window,
    running_var,
    iters,
    rejected,
    vectors,
    partial,
    counters,
    N,
    C,
    HW,
    B,
    images,
    pixels,
    parts,
    chunks,
    slack,
    groups,
    m,
    EPS: tl.constexpr,
    NEW_SHARE: tl.constexpr,
    BATCH_STATS_ITERS: tl.constexpr,
    NO_RENORM_ITERS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    UPDATE: tl.constexpr,
    GROUPED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    FINISH_C: tl.constexpr,
):
    """vectors (6, groups, C) <- x2, var, r, r_std, scale, shift; the state moves if UPDATE.

    Four numbers follow: slot, use_batch_stats, no_renorm, accepted. If GROUPED, vectors get x2 alone and of the
    state only the counters move: `advance_groups` does the rest.
    """
    _partial_sums(
        None,
        x,
        None,
        None,
        partial,
        N,
        C,
        HW,
        B,
        images,
        pixels,
        parts,
        chunks,
        slack,
        CHANNELS_LAST,
        ALIGN,
        WIDE,
        TILE_P,
        TILE_C,
    )
    blocks = tl.cdiv(C, TILE_C)
    block = tl.program_id(0) % blocks
    rows = chunks * parts  # of a group
    ticket = _count_in(counters + 1 + block, 1)
    if ticket == groups * rows - 1:
        tl.store(counters + 1 + block, 0)
        # Read in front of the barriers of the counter: one thread writes them at the end.
        t = tl.load(iters) + 1
        refused = tl.load(rejected)
        slot = t % m
        channel = block * TILE_C + tl.arange(0, TILE_C)
        inside = channel < C
        finite = tl.full([TILE_C], 1, tl.int32)
        for group in range(groups):
            count = tl.minimum(B, N - group * B).to(tl.float32) * HW.to(tl.float32)
            own = partial + group * rows * C
            x2 = _sum_rows(own, channel, inside, rows, C, -1, TILE_C, TILE_ROWS) / count
            tl.store(vectors + group * C + channel, x2, mask=inside)
            finite = tl.minimum(finite, _is_finite(x2))
        if not GROUPED:
            # For the last program, in place of var: the window's sum without the row to be replaced.
            others = _sum_rows(window, channel, inside, m, C, slot, TILE_C, TILE_ROWS)
            tl.store(vectors + C + channel, others, mask=inside)
        # Finished blocks are counted in the low 32 bits, those not finite in the high 32.
        bad = (1 - tl.min(finite, axis=0)).to(tl.int64)
        done = _count_in(counters, 1 + bad * 4294967296)
        if done % 4294967296 == blocks - 1:
            tl.store(counters, 0)
            accepted = done // 4294967296 + bad == 0
            use_batch_stats = t <= BATCH_STATS_ITERS
            no_renorm = t <= NO_RENORM_ITERS
            if not GROUPED:
                for start in range(0, C, FINISH_C):
                    _advance(
                        weight,
                        bias,
                        window + slot * C,
                        running_var,
                        vectors,
                        start,
                        C,
                        m,
                        accepted,
                        use_batch_stats,
                        no_renorm,
                        EPS,
                        NEW_SHARE,
                        LOW,
                        HIGH,
                        UPDATE,
                        FINISH_C,
                    )
            flags = vectors + 6 * groups * C
            tl.store(flags, slot.to(tl.float32))
            tl.store(flags + 1, use_batch_stats.to(tl.float32))
            tl.store(flags + 2, no_renorm.to(tl.float32))
            tl.store(flags + 3, accepted.to(tl.float32))
            if UPDATE:
                tl.store(iters, tl.where(accepted, t, t - 1))
                tl.store(rejected, tl.where(accepted, refused, refused + 1))


@jit
def _advance(
    weight,
    bias,
    row,
    running_var,
    vectors,
    start,
    C,
    m,
    accepted,
    use_batch_stats,
    no_renorm,
    EPS: tl.constexpr,
    NEW_SHARE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    UPDATE: tl.constexpr,
    TILE: tl.constexpr,
):
    """`functional.advance` of a tile of channels, and what its result scales by.

    `row` is the window's row for this input.
    """
    channel = start + tl.arange(0, TILE)
    inside = channel < C
    x2 = tl.load(vectors + channel, mask=inside, other=0.0)
    others = tl.load(vectors + C + channel, mask=inside, other=0.0)
    oldest = tl.load(row + channel, mask=inside, other=0.0)
    before = tl.load(running_var + channel, mask=inside, other=0.0)
    w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    mean = (others + tl.where(accepted, x2, oldest)) / m
    var = tl.where(use_batch_stats, x2, mean)
    r = _renorm(var, before, EPS, LOW, HIGH, no_renorm)
    r_std = r * tl.rsqrt(var + EPS)
    tl.debug_barrier()
    tl.store(vectors + C + channel, var, mask=inside)
    tl.store(vectors + 2 * C + channel, r, mask=inside)
    tl.store(vectors + 3 * C + channel, r_std, mask=inside)
    tl.store(vectors + 4 * C + channel, r_std * w, mask=inside)
    tl.store(vectors + 5 * C + channel, b, mask=inside)
    if UPDATE:
        enters = inside & accepted
        tl.store(row + channel, x2, mask=enters)
        tl.store(running_var + channel, before + NEW_SHARE * (var - before), mask=enters)


@kernel
def backward_sums(
    dy,
    x,
    vectors,
    window,
    factor,
    dweight,
    dbias,
    partial,
    counters,
    N,
    C,
    HW,
    B,
    images,
    pixels,
    parts,
    chunks,
    slack,
    groups,
    m,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    GROUPED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    FINISH_C: tl.constexpr,
):
    """factor (2, groups, C) <- psi, and the factor of x in dx; dweight, dbias (C,) <- the gradients.

    psi enters the window. vectors are those of `forward_sums`. One number follows `factor`: whether
    psi is finite. If GROUPED, the factor and the window are left to `push_groups`.
    """
    scale = vectors + 4 * groups * C
    if RELU:
        _partial_sums(
            dy,
            x,
            scale,
            vectors + 5 * groups * C,
            partial,
            N,
            C,
            HW,
            B,
            images,
            pixels,
            parts,
            chunks,
            slack,
            CHANNELS_LAST,
            ALIGN,
            WIDE,
            TILE_P,
            TILE_C,
        )
    else:
        _partial_sums(
            dy,
            x,
            None,
            None,
            partial,
            N,
            C,
            HW,
            B,
            images,
            pixels,
            parts,
            chunks,
            slack,
            CHANNELS_LAST,
            ALIGN,
            WIDE,
            TILE_P,
            TILE_C,
        )
    blocks = tl.cdiv(C, TILE_C)
    block = tl.program_id(0) % blocks
    rows = chunks * parts  # of a group
    ticket = _count_in(counters + 1 + block, 1)
    if ticket == groups * rows - 1:
        tl.store(counters + 1 + block, 0)
        channel = block * TILE_C + tl.arange(0, TILE_C)
        inside = channel < C
        finite = tl.full([TILE_C], 1, tl.int32)
        weight_grad = tl.zeros([TILE_C], tl.float32)
        bias_grad = tl.zeros([TILE_C], tl.float32)
        for group in range(groups):
            count = tl.minimum(B, N - group * B).to(tl.float32) * HW.to(tl.float32)
            own = partial + group * rows * C
            dyx = _sum_rows(own, channel, inside, rows, C, -1, TILE_C, TILE_ROWS)
            own += groups * rows * C
            bias_grad += _sum_rows(own, channel, inside, rows, C, -1, TILE_C, TILE_ROWS)
            place = group * C + channel
            r_std = tl.load(vectors + 3 * groups * C + place, mask=inside, other=0.0)
            weight_grad += dyx * r_std
            psi = dyx * tl.load(scale + place, mask=inside, other=0.0) / count
            tl.store(factor + place, psi, mask=inside)
            finite = tl.minimum(finite, _is_finite(psi))
        tl.store(dweight + channel, weight_grad.to(dweight.dtype.element_ty), mask=inside)
        tl.store(dbias + channel, bias_grad.to(dbias.dtype.element_ty), mask=inside)
        flags = vectors + 6 * groups * C
        slot = tl.load(flags).to(tl.int32)
        if not GROUPED:
            # For the last program: the window's sum without the row to be replaced.
            others = _sum_rows(window, channel, inside, m, C, slot, TILE_C, TILE_ROWS)
            tl.store(factor + C + channel, others, mask=inside)
        # Finished blocks are counted in the low 32 bits, those not finite in the high 32.
        bad = (1 - tl.min(finite, axis=0)).to(tl.int64)
        done = _count_in(counters, 1 + bad * 4294967296)
        if done % 4294967296 == blocks - 1:
            tl.store(counters, 0)
            accepted = done // 4294967296 + bad == 0
            tl.store(factor + 2 * groups * C, accepted.to(tl.float32))
            if not GROUPED:
                use_batch_stats = tl.load(flags + 1).to(tl.int32) != 0
                for start in range(0, C, FINISH_C):
                    _push(
                        factor,
                        vectors + C,
                        window + slot * C,
                        start,
                        C,
                        m,
                        accepted,
                        use_batch_stats,
                        EPS,
                        FINISH_C,
                    )


@jit
def _push(
    factor,
    variance,
    row,
    start,
    C,
    m,
    accepted,
    use_batch_stats,
    EPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The factor of x in dx for a tile of channels; psi enters `row` of the window."""
    channel = start + tl.arange(0, TILE)
    inside = channel < C
    psi = tl.load(factor + channel, mask=inside, other=0.0)
    others = tl.load(factor + C + channel, mask=inside, other=0.0)
    oldest = tl.load(row + channel, mask=inside, other=0.0)
    var = tl.load(variance + channel, mask=inside, other=0.0)
    mean = (others + tl.where(accepted, psi, oldest)) / m
    result = -tl.where(use_batch_stats, psi, mean) / (var + EPS)
    tl.debug_barrier()
    tl.store(factor + C + channel, result, mask=inside)
    tl.store(row + channel, psi, mask=inside & accepted)


# ------------------------------------------------------------------ the split form
#
# Each program has TILE_C channels of all groups. The windows' last row is the latest.


@jit
def _trailing_mean(
    window,
    rows,
    group,
    channel,
    inside,
    C,
    m,
    TILE_C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Return the mean over the m groups that end with `group`, of `rows` and the window before."""
    total = tl.zeros([TILE_ROWS, TILE_C], tl.float32)
    for first in range(0, m, TILE_ROWS):
        k = first + tl.arange(0, TILE_ROWS)
        place = group + 1 + k  # in the sequence of the window's rows and these
        before = ((k < m) & (place < m))[:, None] & inside[None, :]
        now = ((k < m) & (place >= m))[:, None] & inside[None, :]
        total += tl.load(window + place[:, None] * C + channel[None, :], mask=before, other=0.0)
        total += tl.load(rows + (place - m)[:, None] * C + channel[None, :], mask=now, other=0.0)
    return tl.sum(total, axis=0) / m


@jit
def _enter(
    window,
    rows,
    channel,
    inside,
    C,
    groups,
    m,
    first_iteration,
    accepted,
    TILE_ROWS: tl.constexpr,
):
    """Let the rows of all groups enter the window; at iteration 1 repeated until it is full."""
    repeats = tl.cdiv(m, groups)
    for first in range(0, m, TILE_ROWS):
        k = first + tl.arange(0, TILE_ROWS)
        place = groups + k
        repeated = (k + repeats * groups - m) % groups
        source = tl.where(first_iteration != 0, repeated, place - m)
        old = (k < m) & (place < m) & (first_iteration == 0)
        new = (k < m) & ((place >= m) | (first_iteration != 0))
        moved = tl.load(
            window + place[:, None] * C + channel[None, :],
            mask=old[:, None] & inside[None, :],
            other=0.0,
        )
        fresh = tl.load(
            rows + source[:, None] * C + channel[None, :],
            mask=new[:, None] & inside[None, :],
            other=0.0,
        )
        tl.debug_barrier()
        tl.store(
            window + k[:, None] * C + channel[None, :],
            moved + fresh,  # one of them is 0
            mask=(k < m)[:, None] & inside[None, :] & accepted,
        )


@kernel
def advance_groups(
    weight,
    bias,
    window,
    running_var,
    vectors,
    C,
    groups,
    m,
    EPS: tl.constexpr,
    NEW_SHARE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    UPDATE: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """`functional_split.advance_groups`, and what its result scales by: vectors of `forward_sums`."""
    size = groups * C
    first = tl.load(vectors + 6 * size + 1).to(tl.int32)
    no_renorm = tl.load(vectors + 6 * size + 2).to(tl.int32) != 0
    accepted = tl.load(vectors + 6 * size + 3).to(tl.int32) != 0
    channel = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    inside = channel < C
    w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    running = tl.load(running_var + channel, mask=inside, other=0.0)
    total = tl.zeros([TILE_C], tl.float32)
    for group in range(groups):
        row = vectors + group * C + channel
        mean = _trailing_mean(window, vectors, group, channel, inside, C, m, TILE_C, TILE_ROWS)
        var = tl.where(first != 0, tl.load(row, mask=inside, other=0.0), mean)
        total += var
        tl.store(row + size, var, mask=inside)
    mean = total / groups
    before = tl.where(first != 0, mean, running)
    tl.debug_barrier()
    for group in range(groups):
        row = vectors + group * C + channel
        var = tl.load(row + size, mask=inside, other=0.0)
        r = _renorm(var, before, EPS, LOW, HIGH, no_renorm)
        r_std = r * tl.rsqrt(var + EPS)
        tl.store(row + 2 * size, r, mask=inside)
        tl.store(row + 3 * size, r_std, mask=inside)
        tl.store(row + 4 * size, r_std * w, mask=inside)
        tl.store(row + 5 * size, b, mask=inside)
    if UPDATE:
        moved = before + NEW_SHARE * (mean - before)
        tl.store(running_var + channel, moved, mask=inside & accepted)
        _enter(window, vectors, channel, inside, C, groups, m, first, accepted, TILE_ROWS)


@kernel
def push_groups(
    vectors,
    factor,
    window,
    C,
    groups,
    m,
    EPS: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """The factor of x in dx for all groups, from the psi of `backward_sums`, which enter the window."""
    size = groups * C
    first = tl.load(vectors + 6 * size + 1).to(tl.int32)
    accepted = tl.load(factor + 2 * size).to(tl.int32) != 0
    channel = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    inside = channel < C
    for group in range(groups):
        place = group * C + channel
        mean = _trailing_mean(window, factor, group, channel, inside, C, m, TILE_C, TILE_ROWS)
        psi = tl.where(first != 0, tl.load(factor + place, mask=inside, other=0.0), mean)
        var = tl.load(vectors + size + place, mask=inside, other=0.0)
        tl.store(factor + size + place, -psi / (var + EPS), mask=inside)
    tl.debug_barrier()
    _enter(window, factor, channel, inside, C, groups, m, first, accepted, TILE_ROWS)
