"""Plans: the grids, sizes and constants of the Triton kernels, and their launches.

A plan follows from shapes, formats and settings alone. It is made once and kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import triton_kernels as kernels
from .triton_launch import Arrangement, Launch, workspace

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
    """Return a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Return the least power of two that is not less than n."""
    return 1 << (n - 1).bit_length()


class Geometry:
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


class SumsLaunch(Launch):
    """The launch of a kernel that begins with `_partial_sums`.

    Args:
        kinds: 1 for sums of x * x, 2 for those of dy * x and dy.
        more: the sizes that follow those of `_partial_sums`.
    """

    def __init__(
        self,
        kernel: Any,
        geometry: Geometry,
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
        goes = next(
            (goes for goes in shares if busy[goes] >= 0.9), max(busy, key=lambda goes: busy[goes])
        )
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


class FinishingLaunch(SumsLaunch):
    """A sums launch whose last program goes on with the per-channel work."""

    def __init__(
        self, kernel: Any, geometry: Geometry, kinds: int, constants: dict[str, Any], m: int
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
            self.ensure_grid(*tensors, nothing, nothing.long())
        self(stream, *tensors, *workspace(tensors[0], device, stream, self.partials, self.blocks))


class LayerPlan:
    """The launches of a layer for one shape, dtype, format and setting."""

    def __init__(
        self,
        geometry: Geometry,
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
        rows: dict[str, Any] = {"SCALE_ROW": 4, "SHIFT_ROW": 5, "RELU": relu}
        self.affine = Launch(kernels.affine, constants | rows, arrange)
        rows = {"DY_SCALE_ROW": 4, "SCALE_ROW": 1, "RELU_SHIFT_ROW": 5, "shift": None}
        if not relu:
            rows["relu_shift"] = None
        self.combine = Launch(kernels.combine, constants | rows, arrange)
        constants = {"EPS": eps, "RELU": relu}
        self.backward_sums = FinishingLaunch(kernels.backward_sums, geometry, 2, constants, m)
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
        self.forward_sums = FinishingLaunch(kernels.forward_sums, geometry, 1, constants, m)


@functools.lru_cache(MAX_PLANS)
def layer_plan(
    shape: torch.Size,
    dtype: torch.dtype,
    contiguous: bool,
    device: int,
    batch_size: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    m: int,
    relu: bool,
    eps: float,
    schedule: tuple[float, int, int, float, bool] | None,
) -> LayerPlan:
    """Return the plan of a layer; see `Geometry` and `LayerPlan`."""
    geometry = Geometry(shape, dtype, contiguous, device, batch_size)
    return LayerPlan(geometry, dtypes, m, relu, eps, schedule)


@functools.lru_cache(MAX_PLANS)
def affine_plan(
    shape: torch.Size,
    dtype: torch.dtype,
    contiguous: bool,
    device: int,
    per_image: bool,
    relu: bool,
) -> Launch:
    """Return the launch of `affine` alone; a row for each image makes groups of one image."""
    geometry = Geometry(shape, dtype, contiguous, device, int(per_image))
    arrange, constants = geometry.elementwise()
    constants |= {"SCALE_ROW": 0, "SHIFT_ROW": 0, "RELU": relu}
    return Launch(kernels.affine, constants, arrange)


@functools.lru_cache(MAX_PLANS)
def combine_plan(
    shape: torch.Size,
    dtype: torch.dtype,
    contiguous: bool,
    device: int,
    per_image: bool,
    has_shift: bool,
) -> Launch:
    """Return the launch of `combine` alone."""
    geometry = Geometry(shape, dtype, contiguous, device, int(per_image))
    arrange, constants = geometry.elementwise()
    constants |= {"DY_SCALE_ROW": 0, "SCALE_ROW": 0, "RELU_SHIFT_ROW": 0, "relu_shift": None}
    if not has_shift:
        constants["shift"] = None
    return Launch(kernels.combine, constants, arrange)


@functools.lru_cache(MAX_PLANS)
def sums_plan(
    shape: torch.Size,
    dtype: torch.dtype,
    contiguous: bool,
    device: int,
    per_image: bool,
    has_dy: bool,
) -> SumsLaunch:
    """Return the launch of `sums` alone."""
    geometry = Geometry(shape, dtype, contiguous, device, int(per_image))
    constants: dict[str, Any] = {"relu_scale": None, "relu_shift": None}
    if not has_dy:
        constants["dy"] = None
    return SumsLaunch(kernels.sums, geometry, 1 + has_dy, constants)
