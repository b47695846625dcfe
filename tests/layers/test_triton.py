"""The Triton operators: their values in Triton's interpreter on a CPU, their compilation, a GPU.

Triton decides when it is imported whether it interprets. So `check_*` are tests only of a process
of their own, which `test_values_in_the_interpreter` starts; the tests on a GPU call them.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch

from mabn_d2.layers import MABN2d
from mabn_d2.layers.ops import cpu_ops, triton_ops
from paths import ROOT
from reference import FORMATS, assert_close

pytestmark = pytest.mark.skipif(
    triton_ops.unavailable() is not None, reason=str(triton_ops.unavailable())
)
DTYPES = list(triton_ops.DTYPES)
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 1), (1, 70, 13, 7), (4, 6, 7, 6), (9, 2, 3, 3), (1, 2, 50, 43)]
# Tiles so small that every loop turns more than once, and offsets of 64 bits.
SMALL = {"TILE": 256, "PROGRAMS": 6, "WIDE_CHANNELS": 16, "SUMS_CHANNELS": 8, "WIDE": 0}
SMALL |= {"FINISH_TILE": 64, "FINISH_CHANNELS": 32}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_format = pytest.mark.parametrize("memory_format", FORMATS)
every_shape = pytest.mark.parametrize(
    "shape, rows", [(shape, rows) for shape in SHAPES for rows in (False, True)]
)


@pytest.fixture
def small_tiles(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(triton_ops, name, value)


@every_dtype
@every_format
@every_shape
def check_passes(shape, rows, memory_format, dtype, device="cpu"):
    dy, x = torch.randn(2, *shape, device=device).to(dtype)
    dy, x = (tensor.contiguous(memory_format=memory_format) for tensor in (dy, x))
    vectors = torch.randn(4, *shape[:2] if rows else shape[1:2], device=device)
    a, b, c, d = vectors
    scale, shift, scale_x, other = vectors.double()[..., None, None]
    g, value = dy.double(), x.double()
    gated = torch.where(scale * value + shift <= 0, 0, g)
    for found, wanted in (
        (triton_ops.affine(x, a, b), scale * value + shift),
        (triton_ops.affine(x, a, b, True), (scale * value + shift).relu()),
        (triton_ops.combine(dy, x, a, c), scale * g + scale_x * value),
        (triton_ops.combine(dy, x, a, c, d), scale * g + scale_x * value + other),
        (triton_ops.combine(dy, x, a, c, None, b), scale * gated + scale_x * value),
    ):
        assert_close(found, wanted, dtype)
        assert found.dtype == dtype and found.stride() == x.stride()
    axes = (2, 3) if rows else (0, 2, 3)
    for wanted_g, relu in (g, ()), (gated, (a, b)):
        sums = triton_ops.product_sums(dy, x, rows, *relu)
        for found, wanted in zip(sums, (wanted_g * value, wanted_g), strict=True):
            assert found.dtype == torch.float32
            size = wanted.abs().sum(axes).max().item()
            assert_close(found, wanted.sum(axes), found.dtype, scale=size)


@every_format
@every_shape
def check_passes_in_small_tiles(shape, rows, memory_format, small_tiles):
    check_passes(shape, rows, memory_format, torch.bfloat16)


def check_nan_passes_the_relu(device="cpu"):
    x = torch.tensor([torch.nan, -1.0, 1.0, torch.inf], device=device).view(1, 1, 2, 2)
    y = triton_ops.affine(x, *torch.tensor([[1.0], [0.0]], device=device), True).flatten()
    assert y[0].isnan() and y[1:].tolist() == [0, 1, torch.inf]


def assert_same(found, wanted, dtype):
    finite = wanted.isfinite().cpu()
    assert torch.equal(found.isfinite().cpu(), finite)
    zero = torch.zeros(())
    assert_close(found.cpu().where(finite, zero), wanted.cpu().where(finite, zero), dtype, factor=2)


@every_dtype
@pytest.mark.parametrize("activation, memory_format", [("relu", FORMATS[0]), (None, FORMATS[1])])
def check_layer(activation, memory_format, dtype, shape=(2, 6, 7, 6), device="cpu"):
    """Warm-up, window, clipping, rejection, uncounted forwards: against the layer without it."""
    settings = {"warmup_iters": 6, "clip_start": 9, "clip_limit": 1.2}
    layer = MABN2d(shape[1], 1e-4, 0.7, 1, 4, **settings, activation=activation)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    twin = copy.deepcopy(layer).to(device)
    state = twin.buffer_x2, twin.running_var, twin.iters, twin.rejected
    for t in range(20):
        dy, x = (torch.randn(2, *shape) * (1 + t % 3)).to(dtype)
        if t in (7, 11):
            x[0, t - 7, 0, 0] = torch.nan
        if t == 13:
            dy[0, 2, 1, 0] = torch.inf
        counts = t not in (3, 16)
        own = x.to(device).contiguous(memory_format=memory_format).detach().requires_grad_()
        leaf = x.to(torch.float32, copy=True).requires_grad_()
        layer.zero_grad()
        twin.zero_grad()
        with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(counts):
            patch.setattr(cpu_ops, "OPERATORS", None)
            wanted = layer(leaf)
            y, statistics = triton_ops.mabn(
                own,
                twin.weight,
                twin.bias,
                twin.buffer_gz,
                *state,
                *layer._schedule,
                counts,
                activation is not None,
                0,
            )
            if counts:
                wanted.backward(dy.float())
                y.backward(dy.to(device))
        assert_same(y, wanted, dtype)
        pairs = [*zip(statistics, layer.last, strict=True)]
        pairs += zip(twin.buffers(), layer.buffers(), strict=True)
        if counts:
            assert_same(own.grad, leaf.grad, dtype)
            pairs += [(twin.weight.grad, layer.weight.grad), (twin.bias.grad, layer.bias.grad)]
        for found, expected in pairs:
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert_same(found, expected, torch.float32)
    assert twin.iters.item() == 16 and twin.rejected.item() == 2


@pytest.mark.parametrize("shape", [(3, 6, 7, 8), (1, 70, 2, 1)], ids=str)
def check_layer_in_small_tiles(shape, small_tiles):
    check_layer("relu", torch.contiguous_format, torch.float32, shape)


def check_bad_input_is_refused():
    x, a = torch.randn(2, 3, 4, 5), torch.randn(3)
    with pytest.raises(ValueError, match="contiguous or channels-last"):
        triton_ops.affine(x.mT, a, a)
    for other in x[:1], x.half(), x.contiguous(memory_format=torch.channels_last):
        with pytest.raises(ValueError, match="same shape"):
            triton_ops.product_sums(other, x)


def test_values_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-o", "python_functions=check_*", __file__],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_cpu_is_not_taken():
    assert "cpu" in triton_ops.unsupported(torch.ones(1, 2, 3, 4))


def compiled(kernel, arguments, constants, capability):
    """Compile what a launch with these arguments would, without a GPU; return its PTX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    values = dict(zip(kernel.arg_names, arguments)) | constants
    options = {"num_warps": values.pop("num_warps", 4)}
    signature, fixed, attributes = {}, {}, {}
    for k, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name], fixed[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
            attributes[(k,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, attributes)
    return triton.compile(source, GPUTarget("cuda", capability, 32), options).asm["ptx"]


@every_dtype
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_to_vector_accesses(dtype, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = []
    monkeypatch.setattr(
        triton_ops,
        "_launch",
        lambda kernel, programs, x, *values, **constants: launches.append(
            (kernel, values, constants)
        ),
    )
    v, window, one = torch.zeros(32), torch.zeros(16, 32), torch.zeros(1, dtype=torch.int64)
    for shape, memory_format in zip(
        [(2, 32, 60, 70), (2, 32, 7, 7), (2, 32, 25, 42)], [FORMATS[0], *FORMATS], strict=True
    ):
        x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=memory_format)
        schedule = (1e-5, 0.98, 100, 1000, 5.0, True)
        triton_ops.normalize(x, v, v, window, v, one, one, *schedule, True)
        triton_ops.normalize_backward(x, x, v, v, v, v, window, one, one.bool())
    rows = torch.zeros(2, 32)
    monkeypatch.setattr(triton_ops, "WIDE", 0)
    triton_ops.product_sums(x, x, True)
    triton_ops.combine(x, x, rows, rows, rows)
    triton_ops.affine(x.contiguous()[:, :, :7, :7].contiguous(), rows, rows)
    for kernel, values, constants in launches:
        assert "ld.global.v4.b32" in compiled(kernel, values, constants, capability)


@pytest.mark.gpu
@every_dtype
@every_format
def test_values_on_a_gpu(memory_format, dtype):
    for shape in *SHAPES, (2, 64, 200, 336), (2, 1024, 50, 84), (600, 256, 7, 7):
        for rows in False, True:
            check_passes(shape, rows, memory_format, dtype, "cuda")
    for activation in None, "relu":
        for shape in (2, 6, 7, 6), (2, 1100, 2, 1):
            check_layer(activation, memory_format, dtype, shape, "cuda")
    check_nan_passes_the_relu("cuda")


@pytest.mark.gpu
def test_graph_capture():
    x, dy = torch.randn(2, 3, 8, 20, 30, device="cuda").unbind()
    weight, bias, *statistics = torch.rand(5, 8, device="cuda")
    windows = torch.zeros(2, 4, 8, device="cuda")
    counters = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
    state = [statistics[0], windows, counters]
    start = [tensor.clone() for tensor in state]

    def step():
        schedule = (1e-5, 0.98, 3, 5, 5.0, True, True)
        y, *others, var, r_std, scale = triton_ops.normalize(
            x, weight, bias, windows[0], statistics[0], *counters, *schedule
        )
        return y, *triton_ops.normalize_backward(
            dy, x, scale, bias, var, r_std, windows[1], *others[3:5]
        )

    step()  # compiles
    wanted = []
    for tensor, value in zip(state, start, strict=True):
        tensor.copy_(value)
    for _ in range(8):
        wanted.append([*step(), *(tensor.clone() for tensor in state)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for tensor, value in zip(state, start, strict=True):
        tensor.copy_(value)
    for expected in wanted:
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip([*results, *state], expected, strict=True))
