"""A GPU for tests, on a machine without one: Triton compiles for it, `emulator.py` executes the PTX.

Import this before Triton is used, in a process of its own. A stub libcuda (stub.c, built on first use)
takes the place of the driver. Each launch comes with the arguments as the driver gets them, and is
executed on tensors in the CPU's memory.

The environment variable PTX_CAPABILITY is the GPU's compute capability times ten: 80 or 90.
"""

import collections
import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_folder = Path(tempfile.mkdtemp(prefix="ptx-stub-"))
_library = _folder / "libcuda.so.1"
_source = Path(__file__).with_name("stub.c")
subprocess.run(
    [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    + ["-o", _library, _source],
    check=True,
)
(_folder / "libcuda.so").symlink_to(_library.name)
os.environ["TRITON_LIBCUDA_PATH"] = str(_folder)
_stub = ctypes.CDLL(str(_library), mode=ctypes.RTLD_GLOBAL)

import emulator  # noqa: E402
import memory  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.runtime import driver  # noqa: E402

from mabn_d2.layers.ops import triton_launch  # noqa: E402

CAPABILITY = int(os.environ.get("PTX_CAPABILITY", "90"))
MULTIPROCESSORS = 2  # few, so that a grid has few programs


class _Driver(nvidia.CudaDriver):
    def __init__(self):
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_device_capability = lambda device=0: (CAPABILITY // 10, CAPABILITY % 10)
        self.get_current_stream = lambda device=0: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None


driver.set_active(_Driver())
triton_launch._multiprocessors = lambda device: (MULTIPROCESSORS, 2048)

_kernels = {}  # what Triton compiled, by the driver's handle
_programs = {}
_call, _compile = triton_launch.Launch.__call__, triton_launch.Launch._compile
_current = []  # the names and tensors of the launch that goes on; then its fault
launches = []  # a Launched for each
Launched = collections.namedtuple("Launched", "name programs registers spills ptx")


@ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)
)
def _on_launch(function, programs, threads, parameters):
    try:
        compiled = _kernels[function]
        if function not in _programs:
            _programs[function] = emulator.Program(compiled.asm["ptx"])
        program = _programs[function]
        assert threads == program.threads
        values = []
        for k, (_, kind) in enumerate(program.parameters):
            size = int(kind[1:]) // 8
            values.append(int.from_bytes(ctypes.string_at(parameters[k], size), sys.byteorder))
        launches.append(
            Launched(
                compiled.name, programs, compiled.n_regs, compiled.n_spills, compiled.asm["ptx"]
            )
        )
        program.run(programs, values, memory.GlobalMemory(_current[0]))
    except BaseException as fault:
        _current.append(fault)


def execute(wanted):
    """Execute launches, or let the driver ignore them."""
    _stub.stub_set_on_launch(_on_launch if wanted else None)


def forget_context():
    """Let this thread be one that has not used the CUDA runtime yet."""
    _stub.stub_forget_context()


execute(True)
launch_without_checks = _call


def _compile_and_keep(launch, tensors):
    compiled = _compile(launch, tensors)
    _kernels[compiled.function] = compiled
    return compiled


def _call_and_raise(launch, stream, *tensors):
    names = [name for name in launch.kernel.arg_names if name not in launch.constants]
    _current[:] = [list(zip(names, tensors))]
    _call(launch, stream, *tensors)
    for fault in _current[1:]:
        shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in _current[0]}
        raise memory.Fault(f"{launch.name} {shapes} {launch.sizes}: {fault}") from fault


triton_launch.Launch._compile = _compile_and_keep
triton_launch.Launch.__call__ = _call_and_raise
