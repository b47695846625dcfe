"""Compiles Triton kernels and launches them with little work on the host.

A launch through Triton's JIT binds, specializes and looks up each argument again. A layer repeats the
same launches in every iteration, and only the addresses of the tensors differ. `Launch` therefore lets
Triton compile the kernel once, keeps the packed arguments, and calls the CUDA driver directly.
"""

import ctypes
import functools
import os
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Arrangement = tuple[int, Sequence[int]]  # the number of programs, and the sizes
NUM_WARPS = 4
# Of one multiprocessor, from compute capability 8.0 on.
REGISTERS, REGISTERS_PER_ALLOCATION, PARTITIONS = 65536, 256, 4
WARP_SIZE = 32
CUDA_ERROR_INVALID_CONTEXT = 201
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Programs of a grid in Triton's interpreter, which has no multiprocessors.
INTERPRETED_PROGRAMS = 64


def programs_that_fit(
    registers: int,
    multiprocessors: int,
    threads_per_multiprocessor: int,
    num_warps: int = NUM_WARPS,
) -> int:
    """Return how many programs a device runs at the same time.

    Args:
        registers: of each thread. Each of a multiprocessor's four partitions has a quarter of the
            registers and gives them to warps in units of 256.
        multiprocessors, threads_per_multiprocessor: see `torch.cuda.get_device_properties`.
        num_warps: of a program.
    """
    of_warp = -(-registers * WARP_SIZE // REGISTERS_PER_ALLOCATION) * REGISTERS_PER_ALLOCATION
    warps = threads_per_multiprocessor // WARP_SIZE
    if of_warp:
        warps = min(warps, REGISTERS // PARTITIONS // of_warp * PARTITIONS)
    return max(1, warps // num_warps) * multiprocessors


@functools.cache
def _multiprocessors(device: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.max_threads_per_multi_processor


def current_stream(device: int) -> int:
    """Return the address of the current stream of a device; 0 for a CPU (-1), which has none."""
    return torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _set_context(device: int) -> None:
    """Make the device's context, which torch uses, that of this thread.

    A thread, such as autograd's, has none before its first call of the CUDA runtime that needs one.
    """
    driver, handle, context = _driver(), ctypes.c_int(), ctypes.c_void_p()
    driver.cuDeviceGet(ctypes.byref(handle), device)
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
    driver.cuCtxSetCurrent(context)


class _Compiled:
    """A kernel, compiled for one device and alignment of its tensors, with room for its arguments.

    Attributes:
        launch: takes a stream as c_void_p; returns the driver's error, or 0.
        set_pointers: takes the buffer, 0 and the pointers.
        lock: to hold from `set_pointers` to `launch`, because threads may share a Launch.
    """

    def __init__(self, compiled: Any, pointers: int, sizes: Sequence[int], programs: int) -> None:
        self.compiled = compiled  # keeps the module loaded
        # Newer Triton adds two pointers to scratch memory, which these kernels do not use.
        layout = f"@{pointers}P{len(sizes)}i0P2P"
        self.buffer = ctypes.create_string_buffer(struct.calcsize(layout))
        first = ctypes.addressof(self.buffer)
        size_at = pointers * 8
        scratch_at = len(self.buffer) - 16
        struct.pack_into(f"@{len(sizes)}i", self.buffer, size_at, *sizes)
        places = [8 * k for k in range(pointers)]
        places += [size_at + 4 * k for k in range(len(sizes))]
        places += [scratch_at, scratch_at + 8]
        parameters = (ctypes.c_void_p * len(places))(*(first + place for place in places))
        self.set_pointers = struct.Struct(f"@{pointers}P").pack_into
        self.lock = threading.Lock()
        one, threads = ctypes.c_uint(1), ctypes.c_uint(compiled.metadata.num_warps * WARP_SIZE)
        grid = ctypes.c_uint(programs), one, one, threads, one, one
        shared = ctypes.c_uint(compiled.metadata.shared)
        call, function = _driver().cuLaunchKernel, ctypes.c_void_p(compiled.function)
        self.launch = lambda stream: call(function, *grid, shared, stream, parameters, None)


class Launch:
    """The launches of a kernel with the same sizes and constants, on one device.

    Args:
        kernel: its parameters are tensors, then sizes (int32), then constants.
        constants: by name; an optional tensor that is not given is a constant, too.
        arrange: takes the number of programs that the device runs at the same time; returns the
            number of programs and the sizes.
    """

    def __init__(
        self,
        kernel: Any,
        constants: dict[str, Any],
        arrange: Callable[[int], Arrangement],
    ) -> None:
        self.kernel, self.constants, self._arrange = kernel, constants, arrange
        self.programs = 0
        self.sizes: Sequence[int] = ()
        self._aligned: _Compiled | None = None
        self._unaligned: dict[tuple[bool, ...], _Compiled] = {}

    def __call__(self, stream: int, *tensors: torch.Tensor) -> None:
        """Launch on a stream of the current device, which is that of the tensors."""
        pointers = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        compiled = self._aligned
        if bits & 15 or compiled is None:
            self.ensure_grid(*tensors)
            if INTERPRETED:
                self.kernel[(self.programs,)](**self._arguments(tensors, self.sizes))
                return
            compiled = self._find(tensors, pointers)
        with compiled.lock:
            compiled.set_pointers(compiled.buffer, 0, *pointers)
            status = compiled.launch(ctypes.c_void_p(stream))
            if status == CUDA_ERROR_INVALID_CONTEXT:
                _set_context(max(tensors[0].get_device(), 0))
                status = compiled.launch(ctypes.c_void_p(stream))
        if status:
            raise RuntimeError(f"CUDA driver error {status} at the launch of {self.name}")

    @property
    def name(self) -> str:
        """The name of the kernel, for messages."""
        return self.kernel.fn.__name__

    def ensure_grid(self, *tensors: torch.Tensor) -> None:
        """Choose the grid if it is not chosen; of the tensors, only dtypes and the device matter."""
        if self.programs:
            return
        if INTERPRETED:
            fit = INTERPRETED_PROGRAMS
        else:
            compiled = self._compile(tensors)
            fit = programs_that_fit(compiled.n_regs, *_multiprocessors(tensors[0].get_device()))
        programs, self.sizes = self._arrange(fit)
        self.programs = programs  # last, because another thread may look at it

    def _find(self, tensors: Sequence[torch.Tensor], pointers: Sequence[int]) -> _Compiled:
        """Return the kernel for such pointers: Triton compiles for those that are multiples of 16."""
        key = tuple(pointer % 16 == 0 for pointer in pointers)
        compiled = self._unaligned.get(key)
        if compiled is None:
            compiled = _Compiled(self._compile(tensors), len(pointers), self.sizes, self.programs)
            self._unaligned[key] = compiled
            if all(key):
                self._aligned = compiled
        return compiled

    def _arguments(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> dict[str, Any]:
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        return dict(zip(names, [*tensors, *sizes], strict=True)) | self.constants

    def _compile(self, tensors: Sequence[torch.Tensor]) -> Any:
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        sizes = self.sizes or [0] * (len(names) - len(tensors))
        arguments = self._arguments(tensors, sizes)
        compiled = self.kernel.run(grid=(1,), warmup=True, num_warps=NUM_WARPS, **arguments)
        compiled._init_handles()
        return compiled


class _Workspace(NamedTuple):
    partials: int
    blocks: int
    tensors: tuple[torch.Tensor, torch.Tensor]


_workspaces: dict[tuple[int, int], _Workspace] = {}


def workspace(
    x: torch.Tensor, device: int, stream: int, partials: int, blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 numbers (at least `partials`), and int64 zeros (at least 1 + blocks).

    Kernels on one stream run one after another and leave the zeros as they found them. So each stream
    has one workspace, which needs no memset. A CUDA graph may run on any stream, at the same time as
    other work; so what is captured gets a workspace of its own, whose memset is part of the graph.

    Args:
        x: an activation on the device.
        device, stream: its index and the address of its current stream.
    """
    if device >= 0 and torch.cuda.is_current_stream_capturing():
        return _new_workspace(x, partials, blocks)
    found = _workspaces.get((device, stream))
    if found is None or found.partials < partials or found.blocks < blocks:
        if found is not None:
            partials, blocks = max(partials, found.partials), max(blocks, found.blocks)
        found = _Workspace(partials, blocks, _new_workspace(x, partials, blocks))
        _workspaces[device, stream] = found
    return found.tensors


def _new_workspace(
    x: torch.Tensor, partials: int, blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(partials, dtype=torch.float32),
        x.new_zeros(1 + blocks, dtype=torch.int64),
    )
