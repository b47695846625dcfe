"""The checks of test_ptx.py, which starts them with pytest in a process of their own."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import gpu
import memory
import triton
import triton.language as tl

import triton_checks
from mabn_d2.layers.ops import triton_ops, triton_plan
from mabn_d2.layers.ops.triton_launch import Launch
from reference import FORMATS

STEPS = range(6, 9)  # window with an input that is rejected, then a dy that is, then clipping
SMALL = {"TILE": 256, "WIDE_CHANNELS": 16, "SUMS_CHANNELS": 8, "WIDE": 0}
SMALL |= {"FINISH_TILE": 128, "FINISH_CHANNELS": 128, "GROUP_CHANNELS": 16}
every_form = pytest.mark.parametrize("form", triton_checks.FORMS)
every_format = pytest.mark.parametrize("memory_format", FORMATS)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that every loop turns more than once, and offsets of 64 bits."""
    for name, value in SMALL.items():
        monkeypatch.setattr(triton_plan, name, value)
    triton_checks.forget_plans()
    yield
    triton_checks.forget_plans()


@every_form
@every_format
@pytest.mark.parametrize(
    "dtype, shape, offset",
    [
        (torch.float32, (3, 6, 7, 6), 0),
        (torch.float16, (2, 24, 13, 5), 1),  # misaligned x; a plane's size is odd
        (torch.bfloat16, (5, 3, 1, 1), 0),
    ],
    ids=str,
)
def check_layer(form, memory_format, dtype, shape, offset):
    triton_checks.check_layer(form, True, memory_format, dtype, shape, steps=STEPS, offset=offset)


@every_form
def check_layer_in_small_tiles(form, small_tiles):
    """Several programs for each channel, several blocks of channels."""
    triton_checks.check_layer(
        form, False, FORMATS[form == "split"], torch.float16, (6, 20, 9, 8), steps=STEPS
    )


@every_format
@pytest.mark.parametrize("rows", [False, True])
def check_passes(rows, memory_format):
    triton_checks.check_passes((2, 12, 21, 13), rows, memory_format, torch.float16, offset=4)


def check_large_plane():
    """A plane larger than a tile, which does not begin where a tile does."""
    triton_checks.check_layer(
        "ordinary", True, FORMATS[0], torch.float16, (1, 3, 46, 47), steps=(9,)
    )


def check_same_relu_both_ways():
    triton_checks.check_same_relu_both_ways()


def check_thread_without_context():
    """Autograd's thread has no CUDA context at first."""
    x, vectors = torch.randn(1, 4, 8, 8), torch.randn(2, 4)
    wanted = triton_ops.affine(x, *vectors)
    gpu.forget_context()
    assert torch.equal(triton_ops.affine(x, *vectors), wanted)


def check_vector_accesses():
    """Aligned activations are read and written 16 bytes at a time."""
    triton_checks.forget_plans()
    for memory_format in FORMATS:
        for dtype in torch.float32, torch.float16:
            gpu.launches.clear()
            triton_checks.check_layer(
                "ordinary", True, memory_format, dtype, (1, 16, 16, 8), steps=(9,)
            )
            for launch in gpu.launches:
                assert "ld.global.v4.b32" in launch.ptx, launch.name
                if launch.name in ("affine", "combine"):
                    assert "st.global.v4.b32" in launch.ptx, launch.name


def check_registers():
    """The grid of the sums follows the registers that the compiler gave the kernel."""
    gpu.launches.clear()
    triton_checks.check_layer(
        "ordinary", True, FORMATS[1], torch.float32, (4, 64, 8, 8), steps=(9,)
    )
    sums = [launch for launch in gpu.launches if launch.name.endswith("_sums")]
    assert sums and all(16 < launch.registers <= 128 and launch.spills == 0 for launch in sums)


# That the emulator notices what is wrong on a GPU.


@triton.jit
def _exchange(source, target, N: tl.constexpr, BARRIER: tl.constexpr):
    """Each thread reads what another has written."""
    k = tl.arange(0, N)
    tl.store(target + k, tl.load(source + k))
    if BARRIER:
        tl.debug_barrier()
    tl.store(source + k, tl.load(target + (k + 64) % N))


@triton.jit
def _last_sums(values, target, counter, N: tl.constexpr, SEM: tl.constexpr, BARRIER: tl.constexpr):
    """The last program adds what all programs have written."""
    pid = tl.program_id(0)
    k = tl.arange(0, N)
    tl.store(values + pid * N + k, k + pid)
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem=SEM) == tl.num_programs(0) - 1:
        tl.debug_barrier()
        total = tl.zeros([N], tl.int32)
        for other in range(tl.num_programs(0)):
            total += tl.load(values + other * N + k)
        tl.store(target + k, total)


@triton.jit
def _copy(source, target, first, N: tl.constexpr):
    k = tl.arange(0, N)
    tl.store(target + k, tl.load(source + first + k))


def launch(kernel, programs, sizes, constants, *tensors):
    Launch(kernel, constants, lambda fit: (programs, sizes))(0, *tensors)


def check_races_of_threads_are_noticed():
    a, b = torch.zeros(2, 256, dtype=torch.int32)
    launch(_exchange, 1, (), {"N": 256, "BARRIER": True}, a, b)
    with pytest.raises(memory.Fault, match="another thread since the barrier"):
        launch(_exchange, 1, (), {"N": 256, "BARRIER": False}, a, b)


def check_races_of_programs_are_noticed():
    def run(**constants):
        values, target = torch.zeros(4, 128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
        counter = torch.zeros(1, dtype=torch.int64)
        launch(_last_sums, 4, (), {"N": 128, **constants}, values, target, counter)
        return target

    assert torch.equal(run(SEM="acq_rel", BARRIER=True), (4 * torch.arange(128) + 6).int())
    with pytest.raises(memory.Fault, match="another program"):
        run(SEM="acq_rel", BARRIER=False)  # releases what its own thread has written alone
    for incomplete in "relaxed", "acquire", "release":
        with pytest.raises(memory.Fault, match="another program"):
            run(SEM=incomplete, BARRIER=True)


def check_bounds_are_noticed():
    source, target = torch.zeros(200), torch.zeros(128)
    launch(_copy, 1, (72,), {"N": 128}, source, target)
    with pytest.raises(memory.Fault, match="out of range"):
        launch(_copy, 1, (73,), {"N": 128}, source, target)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def check_any_layer(seed):
    """Random shapes, dtypes, formats, alignments and forms."""
    torch.manual_seed(seed)

    def choice(options):
        return options[int(torch.randint(len(options), ()))]

    h, w = choice([(1, 1), (2, 1), (7, 7), (8, 8), (14, 14), (13, 21), (40, 50), (1, 2049)])
    c = choice([1, 2, 3, 8, 12, 16, 17, 33, 64, 130])
    n = choice([1, 2, 3, 5, 8])
    while n * c * h * w > 12000:
        n, c = max(1, n // 2), max(1, c // 2)
    triton_checks.check_layer(
        choice(triton_checks.FORMS),
        choice([False, True]),
        choice(FORMATS),
        choice(triton_ops.DTYPES),
        (n, c, h, w),
        steps=choice([(0, 1), (6, 7, 8), (9,)]),
        offset=choice([0, 0, 1, 4, 8]),
        parameter_dtype=choice([torch.float32, torch.bfloat16]),
    )
