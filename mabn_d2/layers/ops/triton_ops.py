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
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import triton_kernels as kernels
from .memory_format import dense_like, memory_format_of
from .triton_kernels import unavailable as unavailable
from .triton_launch import Arrangement, Launch, current_stream, workspace

NAME = "Triton"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# A program of 4 warps has 16 elements a thread: two vectors of 16 bytes in half precision, four in
# full.
TILE = 2048
# Channels of a tile in channels-last. Sums take few, for the more programs at the same number of
# partial sums; 32 of them are still whole sectors of memory.
WIDE_CHANNELS, SUMS_CHANNELS = 256, 32
# At most so many partial sums of a kind.
PARTIALS = 32768
# Tiles of the per-channel work.
FINISH_TILE, FINISH_CHANNELS, GROUP_CHANNELS = 2048, 512, 32
# From here on offsets are computed in 64 bits. Far below 2^31: masked lanes lie beyond the tensor.
WIDE = 2**30
# Plans that are kept. Training at many image sizes needs some ten for each size.
MAX_PLANS = 8192


def divide_up(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Return the least power of two that is not less than n."""
    return 1 << (n - 1).bit_length()


def unsupported(*tensors: torch.Tensor, split_batch: bool = False) -> str | None:
    """Return why the backend cannot take activations, vectors and windows like these, or None.

    Args:
        tensors: the activation first, dense and not empty.
        split_batch: whether `mabn` is wanted with a batch_size, which makes no difference here.
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


def mabn(
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
    """Run a whole layer in training; see `torch_ops.mabn`."""
    device = x.get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return mabn(
                x,
                weight,
                bias,
                psi_window,
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
                batch_size,
            )
    plan = _layer_plan(
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
    plan = _layer_plan(
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
    guard = torch.cuda.device(device) if device >= 0 else contextlib.nullcontext()
    with guard:
        return _MABN.apply(x, weight, bias, psi_window, vectors, plan, current_stream(device))


class Statistics:
    """The fields of `mabn.Statistics`, made from a forward's vectors when they are asked for."""

    __slots__ = ("plan", "update_state", "vectors")

    def __init__(self, vectors: torch.Tensor, plan: _LayerPlan, update_state: bool) -> None:
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
    def forward(ctx, x, weight, bias, psi_window, vectors, plan, stream):
        y = torch.empty_like(x)
        plan.affine(stream, x, vectors, vectors, y)
        ctx.save_for_backward(x, vectors)
        # Written to in the backward, which the checks of save_for_backward forbid.
        ctx.psi_window, ctx.plan = psi_window, plan
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 7
        x, vectors = ctx.saved_tensors
        needs_dx = ctx.needs_input_grad[0]
        dx, dweight, dbias = _backward(ctx.plan, dy, x, vectors, ctx.psi_window, needs_dx)
        return dx, dweight, dbias, None, None, None, None


def _backward(plan, dy, x, vectors, psi_window, needs_dx):
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
    per_image, (scale, shift) = _rows(x, (scale, shift))
    y = torch.empty_like(x)
    _run("affine", x, per_image, (relu,), x, scale, shift, y)
    return y


def combine(
    dy: torch.Tensor,
    x: torch.Tensor,
    dy_scale: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return dy_scale * dy + scale * x + shift; see `torch_passes.combine`."""
    per_image, (dy_scale, scale, shift) = _rows(x, (dy_scale, scale, shift), dy)
    dx = torch.empty_like(x)
    if shift is None:
        _run("combine", x, per_image, (False,), dy, x, dy_scale, scale, dx)
    else:
        _run("combine", x, per_image, (True,), dy, x, dy_scale, scale, shift, dx)
    return dx


def product_sums(
    dy: torch.Tensor, x: torch.Tensor, per_image: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sum(dy * x) and sum(dy); see `torch_passes.product_sums`."""
    _rows(x, (), dy)
    products, totals = _run("sums", x, per_image, (True,), dy, x)
    return products, totals


def square_sums(x: torch.Tensor, per_image: bool = False) -> torch.Tensor:
    """Return sum(x * x); see `torch_passes.square_sums`."""
    _rows(x, ())
    return _run("sums", x, per_image, (False,), x)[0]


def _rows(
    x: torch.Tensor, vectors: tuple[torch.Tensor | None, ...], dy: torch.Tensor | None = None
) -> tuple[bool, list[torch.Tensor | None]]:
    """Return whether any vector has a row for each image, and all of them in the form of that.

    Raises:
        ValueError: if x is not dense, or dy is not like x.
    """
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"expected contiguous or channels-last, got strides {x.stride()}")
    if dy is not None and not (
        dy.shape == x.shape
        and dy.dtype == x.dtype
        and dy.is_contiguous(memory_format=memory_format_of(x))
    ):
        raise ValueError("expected two tensors of the same shape, dtype and memory format")
    per_image = any(vector is not None and vector.dim() == 2 for vector in vectors)
    shape = x.shape[:2] if per_image else x.shape[1:2]
    return per_image, [v if v is None else v.expand(shape).contiguous() for v in vectors]


def _run(
    name: str, x: torch.Tensor, per_image: bool, options: tuple[bool, ...], *tensors: torch.Tensor
) -> torch.Tensor | None:
    """Launch a pass alone; return the sums of `sums`, (1 or 2, C) or (1 or 2, N, C)."""
    device = x.get_device()
    plan = _pass_plan(name, x.shape, x.dtype, x.is_contiguous(), device, per_image, options)
    guard = torch.cuda.device(device) if device >= 0 else contextlib.nullcontext()
    with guard:
        stream = current_stream(device)
        if not isinstance(plan, _SumsLaunch):
            plan(stream, *tensors)
            return None
        if not plan.programs:
            plan.prepare(*tensors, tensors[0].new_empty(0, dtype=torch.float32))
        partial = x.new_empty(plan.partials, dtype=torch.float32)
        plan(stream, *tensors, partial)
        rows = partial.view(plan.kinds, -1, plan.rows, x.shape[1]).sum(2)
        return rows if per_image else rows.squeeze(1)


# Plans: what follows from shapes, formats and settings alone.


class _Geometry:
    """How the kernels look at an activation that is `groups` groups of images.

    Attributes:
        n, channels, hw, batch: N, C, H * W and the images of a group.
        channels_last: whether a pixel's channels lie side by side.
        shape: (C,), or (groups, C) if the vectors have a row for each group.
    """

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        contiguous: bool,
        device: int,
        batch_size: int,
    ) -> None:
        self.n, self.channels, h, w = shape
        self.hw = h * w
        self.device = device
        self.batch = batch_size or self.n
        self.groups = divide_up(self.n, self.batch)
        self.shape = (self.groups, self.channels) if batch_size else (self.channels,)
        self.grouped = bool(batch_size)
        self.channels_last = not contiguous or self.hw == 1
        self.size = self.n * self.channels * self.hw
        vector = 16 // dtype.itemsize
        run = self.channels if self.channels_last else self.size
        self.align = vector if run % vector == 0 else 1

    def elementwise(self) -> tuple[Callable[[int], Arrangement], dict[str, Any]]:
        """Return the grid and sizes, and the constants, of an elementwise pass."""
        tile_c = min(power_of_two(self.channels), WIDE_CHANNELS) if self.channels_last else 1
        if self.channels_last:
            programs = divide_up(self.n * self.hw, TILE // tile_c)
            programs *= divide_up(self.channels, tile_c)
        else:
            programs = divide_up(self.size, TILE)
        sizes = self.n, self.channels, self.hw, self.batch, self.groups
        constants = {
            "CHANNELS_LAST": self.channels_last,
            "GROUPED": self.grouped,
            "SMALL": self.hw < TILE and not self.channels_last,
            "ALIGN": self.align,
            "WIDE": self.size >= WIDE,
            "TILE": TILE,
            "TILE_C": tile_c,
        }
        return lambda fit: (programs, sizes), constants


class _SumsLaunch(Launch):
    """The launch of a kernel that begins with `_partial_sums`.

    Args:
        kinds: 1 for sums of x * x, 2 for those of dy * x and dy.
        more: the sizes that follow those of `_partial_sums`.
    """

    def __init__(
        self,
        kernel: Any,
        geometry: _Geometry,
        kinds: int,
        constants: dict[str, Any],
        more: tuple[int, ...] = (),
    ) -> None:
        g = geometry
        self.geometry, self.kinds, self.more = geometry, kinds, more
        self.n, self.hw, self.batch = g.n, g.hw, g.batch
        self.slack = 0
        if g.channels_last:
            if g.groups == 1:  # all pixels in one row
                self.n, self.hw, self.batch = 1, g.n * g.hw, 1
            self.tile_c = min(power_of_two(g.channels), SUMS_CHANNELS)
            self.tile_p = TILE // self.tile_c
        else:
            if g.hw % g.align:
                self.slack = g.align - 1
            self.tile_p = min(max(power_of_two(g.hw + self.slack), 16), TILE)
            self.tile_c = min(power_of_two(g.channels), TILE // self.tile_p)
        self.blocks = divide_up(g.channels, self.tile_c)
        self.rows = self.partials = 0  # of a group; of all groups and kinds
        constants = constants | {
            "CHANNELS_LAST": g.channels_last,
            "ALIGN": g.align,
            "WIDE": g.size >= WIDE,
            "TILE_P": self.tile_p,
            "TILE_C": self.tile_c,
        }
        super().__init__(kernel, constants, self._arrange_sums)

    def _arrange_sums(self, fit: int) -> Arrangement:
        """Divide images and pixels among programs so that few multiprocessors wait for others."""
        g = self.geometry
        most = max(1, PARTIALS // g.channels)
        # In one go of all multiprocessors, or in a few if that leaves fewer of them idle.
        shares = {goes: min(most, goes * fit // self.blocks) for goes in (1, 2, 3, 4)}
        busy = {goes: rows * self.blocks / (goes * fit) for goes, rows in shares.items()}
        goes = next((goes for goes in shares if busy[goes] >= 0.9), max(busy, key=busy.get))
        of_group = max(1, shares[goes] // g.groups)
        images = divide_up(self.batch, of_group)
        chunks = divide_up(self.batch, images)
        tiles = divide_up(self.hw + self.slack, self.tile_p)
        parts = max(1, min(tiles, of_group // chunks))
        pixels = divide_up(tiles, parts) * self.tile_p - self.slack
        parts = divide_up(self.hw, pixels)
        self.rows = chunks * parts
        self.partials = self.kinds * g.groups * self.rows * g.channels
        sizes = self.n, g.channels, self.hw, self.batch, images, pixels, parts, chunks, self.slack
        return g.groups * self.rows * self.blocks, (*sizes, *self.more)


class _FinishingLaunch(_SumsLaunch):
    """A sums launch whose last program goes on with the per-channel work."""

    def __init__(
        self, kernel: Any, geometry: _Geometry, kinds: int, constants: dict[str, Any], m: int
    ) -> None:
        super().__init__(kernel, geometry, kinds, constants, (geometry.groups, m))
        self.constants |= {
            "GROUPED": geometry.grouped,
            "TILE_ROWS": max(1, FINISH_TILE // self.tile_c),
            "FINISH_C": min(max(power_of_two(geometry.channels), 32), FINISH_CHANNELS),
        }

    def launch(self, stream: int, *tensors: torch.Tensor) -> None:
        """Launch with room for partial sums, and counters that are zero."""
        device = self.geometry.device
        if not self.programs:
            nothing = tensors[0].new_empty(0, dtype=torch.float32)
            self.prepare(*tensors, nothing, nothing.long())
        self(stream, *tensors, *workspace(tensors[0], device, stream, self.partials, self.blocks))


class _LayerPlan:
    """The launches of a layer for one shape, dtype, format and setting."""

    def __init__(
        self,
        geometry: _Geometry,
        dtypes: tuple[torch.dtype, torch.dtype],
        m: int,
        relu: bool,
        eps: float,
        schedule: tuple[float, int, int, float, bool] | None,
    ) -> None:
        self.relu, self.dtypes = relu, dtypes
        self.grouped, self.shape, self.channels = (
            geometry.grouped,
            geometry.shape,
            geometry.channels,
        )
        vectors = geometry.groups * geometry.channels
        self.vectors_size, self.factor_size = 6 * vectors + 4, 2 * vectors + 1
        arrange, constants = geometry.elementwise()
        rows = {"SCALE_ROW": 4, "SHIFT_ROW": 5, "RELU": relu}
        self.affine = Launch(kernels.affine, constants | rows, arrange)
        rows = {"DY_SCALE_ROW": 4, "SCALE_ROW": 1, "RELU_SHIFT_ROW": 5, "shift": None}
        if not relu:
            rows["relu_shift"] = None
        self.combine = Launch(kernels.combine, constants | rows, arrange)
        constants = {"EPS": eps, "RELU": relu}
        self.backward_sums = _FinishingLaunch(kernels.backward_sums, geometry, 2, constants, m)
        tile = {"TILE_C": GROUP_CHANNELS, "TILE_ROWS": max(1, FINISH_TILE // GROUP_CHANNELS // 4)}
        programs = divide_up(geometry.channels, GROUP_CHANNELS)
        sizes = geometry.channels, geometry.groups, m
        self.push_groups = Launch(
            kernels.push_groups, {"EPS": eps, **tile}, lambda fit: (programs, sizes)
        )
        if schedule is None:  # the statistics are given
            return
        momentum, batch_stats_iters, no_renorm_iters, clip_limit, update_state = schedule
        constants = {
            "EPS": eps,
            "NEW_SHARE": 1 - momentum,
            "LOW": 1 / clip_limit,
            "HIGH": clip_limit,
            "UPDATE": update_state,
        }
        self.advance_groups = Launch(
            kernels.advance_groups, constants | tile, lambda fit: (programs, sizes)
        )
        constants |= {"BATCH_STATS_ITERS": batch_stats_iters, "NO_RENORM_ITERS": no_renorm_iters}
        self.forward_sums = _FinishingLaunch(kernels.forward_sums, geometry, 1, constants, m)


@functools.lru_cache(MAX_PLANS)
def _layer_plan(shape, dtype, contiguous, device, batch_size, *rest) -> _LayerPlan:
    return _LayerPlan(_Geometry(shape, dtype, contiguous, device, batch_size), *rest)


@functools.lru_cache(MAX_PLANS)
def _pass_plan(name, shape, dtype, contiguous, device, per_image, options) -> Launch:
    """Return the launch of a pass alone; a row for each image makes groups of one image."""
    geometry = _Geometry(shape, dtype, contiguous, device, int(per_image))
    (option,) = options
    if name == "sums":
        constants = {"relu_scale": None, "relu_shift": None} | ({} if option else {"dy": None})
        return _SumsLaunch(kernels.sums, geometry, 1 + option, constants)
    arrange, constants = geometry.elementwise()
    if name == "affine":
        constants |= {"SCALE_ROW": 0, "SHIFT_ROW": 0, "RELU": option}
        return Launch(kernels.affine, constants, arrange)
    constants |= {"DY_SCALE_ROW": 0, "SCALE_ROW": 0, "RELU_SHIFT_ROW": 0, "relu_shift": None}
    return Launch(kernels.combine, constants | ({} if option else {"shift": None}), arrange)


def forget_plans() -> None:
    """Forget the plans, which the constants above have gone into."""
    _layer_plan.cache_clear()
    _pass_plan.cache_clear()
