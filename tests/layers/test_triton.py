"""The Triton backend: its values in Triton's interpreter, how it arranges its work, and a GPU.

Triton decides when it is imported whether it interprets. So `check_*` are tests only of a process
of their own, which `test_values_in_the_interpreter` starts; the tests on a GPU call them.
"""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
import torch.utils.checkpoint

import triton_checks
from mabn_d2.layers import MABN2d
from mabn_d2.layers.ops import triton_launch, triton_ops, triton_plan
from paths import ROOT
from reference import FORMATS

pytestmark = pytest.mark.skipif(
    triton_ops.unavailable() is not None, reason=str(triton_ops.unavailable())
)
DTYPES = list(triton_ops.DTYPES)
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 1), (1, 70, 13, 7), (4, 6, 7, 6), (9, 2, 3, 3), (1, 2, 50, 43)]
# Tiles so small that every loop turns more than once, and offsets of 64 bits.
SMALL = {"TILE": 256, "WIDE_CHANNELS": 16, "SUMS_CHANNELS": 8, "WIDE": 0}
SMALL |= {"FINISH_TILE": 32, "FINISH_CHANNELS": 32, "GROUP_CHANNELS": 8}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_format = pytest.mark.parametrize("memory_format", FORMATS)
every_form = pytest.mark.parametrize("form", triton_checks.FORMS)
every_shape = pytest.mark.parametrize(
    "shape, rows", [(shape, rows) for shape in SHAPES for rows in (False, True)]
)


@pytest.fixture
def small_tiles(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(triton_plan, name, value)
    monkeypatch.setattr(triton_launch, "INTERPRETED_PROGRAMS", 6)
    triton_checks.forget_plans()
    yield
    triton_checks.forget_plans()


def check_the_interpreter_itself():
    """It copies; if not, the other checks would only show that it does not."""
    from triton_copy import copy_rows

    source, target = torch.randn(3, 8), torch.zeros(3, 8)
    copy_rows[(1,)](source, target, torch.tensor([3]), 8)
    assert torch.equal(target, source)


@every_dtype
@every_format
@every_shape
def check_passes(shape, rows, memory_format, dtype):
    triton_checks.check_passes(shape, rows, memory_format, dtype)


@every_format
@every_shape
def check_passes_in_small_tiles(shape, rows, memory_format, small_tiles):
    triton_checks.check_passes(shape, rows, memory_format, torch.bfloat16)


def check_nan_passes_the_relu(device="cpu"):
    x = torch.tensor([torch.nan, -1.0, 1.0, torch.inf], device=device).view(1, 1, 2, 2)
    y = triton_ops.affine(x, *torch.tensor([[1.0], [0.0]], device=device), True).flatten()
    assert y[0].isnan() and y[1:].tolist() == [0, 1, torch.inf]


@every_form
@pytest.mark.parametrize("relu, memory_format", [(True, FORMATS[0]), (False, FORMATS[1])])
@every_dtype
def check_layer(form, relu, memory_format, dtype):
    steps = triton_checks.STEPS if dtype == torch.float32 else triton_checks.FEW_STEPS
    triton_checks.check_layer(form, relu, memory_format, dtype, steps=steps)


@every_form
@pytest.mark.parametrize("shape", [(3, 6, 7, 8), (11, 2, 3, 3), (1, 70, 2, 1)], ids=str)
def check_layer_in_small_tiles(form, shape, small_tiles):
    steps = triton_checks.FEW_STEPS
    triton_checks.check_layer(form, True, FORMATS[0], torch.float32, shape, steps=steps)


@every_form
def check_layer_in_half_precision(form):
    bfloat16 = torch.bfloat16
    options = {"steps": triton_checks.FEW_STEPS, "parameter_dtype": bfloat16}
    triton_checks.check_layer(form, True, FORMATS[1], bfloat16, **options)


@every_format
def check_same_relu_both_ways(memory_format):
    triton_checks.check_same_relu_both_ways(memory_format)


def check_no_gradient():
    triton_checks.check_no_gradient()


STRAIGHT = 5  # iterations, the window has 4 rows


@every_form
@pytest.mark.parametrize("use_reentrant", [False, True])
def check_repeated_forward(form, use_reentrant, monkeypatch):
    """A forward that activation checkpointing repeats gives the same gradients and state."""
    monkeypatch.setattr("mabn_d2.layers.mabn.select_backend", lambda *_, **__: triton_ops)
    split = {"split_batch": True} if form == "split" else {}
    results = []
    for repeated in (False, True):
        torch.manual_seed(0)
        layer = MABN2d(
            4, batch_size=2, simulated_batch_size=8, warmup_iters=2, clip_start=2, **split
        )
        for _ in range(STRAIGHT):
            x, dy = torch.randn(2, 4, 4, 5, 5)
            x.requires_grad_()
            layer.zero_grad()
            if repeated:
                y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
            else:
                y = layer(x)
            y.backward(dy)
            results.append([y.detach(), x.grad, layer.weight.grad, *layer.buffers()])
            results[-1] = [tensor.clone() for tensor in results[-1]]
    for straight, again in zip(results[:STRAIGHT], results[STRAIGHT:], strict=True):
        for wanted, found in zip(straight, again, strict=True):
            torch.testing.assert_close(found, wanted)


def check_bad_input_is_refused():
    x, a = torch.randn(2, 3, 4, 5), torch.randn(3)
    with pytest.raises(ValueError, match="contiguous or channels-last"):
        triton_ops.affine(x.mT, a, a)
    for other in x[:1], x.half(), x.contiguous(memory_format=torch.channels_last):
        with pytest.raises(ValueError, match="same shape"):
            triton_ops.product_sums(other, x)


@pytest.mark.timeout(900)
def test_values_in_the_interpreter():
    """Old versions of Triton's interpreter do not work with new ones of numpy."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-x", "-o", "python_functions=check_*", __file__],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    if "FAILED" in done.stdout and "check_the_interpreter_itself" in done.stdout:
        versions = f"Triton {version('triton')} with numpy {version('numpy')}"
        pytest.skip(f"the interpreter of {versions} does not work; test_ptx.py checks the values")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_cpu_is_not_taken():
    assert "cpu" in triton_ops.unsupported(torch.ones(1, 2, 3, 4))


@pytest.mark.parametrize(
    "registers, threads, programs",
    [(32, 2048, 16), (33, 2048, 12), (64, 2048, 8), (95, 2048, 5), (255, 2048, 2), (32, 1536, 12)],
)
def test_programs_that_fit(registers, threads, programs):
    """A thread's registers are given in units of 8; a program has 128 threads."""
    assert triton_launch.programs_that_fit(registers, 132, threads) == 132 * programs


@pytest.mark.gpu
@every_dtype
@every_format
def test_passes_on_a_gpu(memory_format, dtype):
    for shape in *SHAPES, (2, 64, 200, 336), (2, 1024, 50, 84), (600, 256, 7, 7):
        for rows in False, True:
            for offset in 0, 1:
                triton_checks.check_passes(shape, rows, memory_format, dtype, "cuda", offset)
    check_nan_passes_the_relu("cuda")


@pytest.mark.gpu
@every_form
@every_dtype
@every_format
def test_layer_on_a_gpu(form, memory_format, dtype):
    for relu in False, True:
        for shape in (3, 6, 7, 6), (2, 1100, 2, 1), (5, 300, 33, 21):
            for offset in 0, 1:
                triton_checks.check_layer(
                    form, relu, memory_format, dtype, shape, "cuda", offset=offset
                )


def layer_and_input(form, shape=(6, 96, 33, 35), device="cuda"):
    layer = MABN2d(
        shape[1],
        batch_size=2,
        simulated_batch_size=8,
        warmup_iters=3,
        clip_start=4,
        activation="relu",
        split_batch=form == "split",
    ).to(device)
    return layer, torch.randn(2, *shape, device=device)


def step(layer, x, dy):
    """Return everything that a step computes, copied."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    found = [y.detach(), x.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()]
    return [tensor.clone() for tensor in found]


@pytest.mark.gpu
@every_form
def test_equal_runs(form):
    """Which program finishes the sums differs from run to run, the results do not."""
    layer, (x, dy) = layer_and_input(form)
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    wanted = step(layer, x, dy)
    for _ in range(200):
        layer.load_state_dict(start)
        assert all(torch.equal(*pair) for pair in zip(step(layer, x, dy), wanted, strict=True))


@pytest.mark.gpu
@every_form
def test_streams_at_the_same_time(form):
    """Layers on streams of their own do not share the counters of the programs that finish."""
    layers, inputs = zip(*[layer_and_input(form) for _ in range(4)], strict=True)
    twins = [layer_and_input(form)[0] for _ in range(4)]
    for twin, layer in zip(twins, layers, strict=True):
        twin.load_state_dict(layer.state_dict())
    wanted = [
        [step(twin, *tensors) for _ in range(10)]
        for twin, tensors in zip(twins, inputs, strict=True)
    ]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    found = [[] for _ in layers]
    for _ in range(10):
        for k, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[k].append(step(layers[k], *inputs[k]))
    torch.cuda.synchronize()
    for steps, expected in zip(found, wanted, strict=True):
        for values, others in zip(steps, expected, strict=True):
            assert all(torch.equal(*pair) for pair in zip(values, others, strict=True))


@pytest.mark.gpu
@every_form
def test_graph_capture(form):
    """Replays equal the same steps outside of a graph, two graphs on two streams too."""
    layers = [layer_and_input(form)[0] for _ in range(2)]
    _, (x, dy) = layer_and_input(form)
    start = {name: value.clone() for name, value in layers[0].state_dict().items()}
    step(layers[0], x, dy)  # compiles
    layers[0].load_state_dict(start)
    wanted = [step(layers[0], x, dy) for _ in range(8)]
    graphs, results = [torch.cuda.CUDAGraph() for _ in layers], []
    for layer, graph in zip(layers, graphs, strict=True):
        layer.load_state_dict(start)
        with torch.cuda.graph(graph):
            results.append(step(layer, x, dy))
        layer.load_state_dict(start)
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for expected in wanted:
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for found in results:
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_form
def test_device_that_is_not_current(form):
    layer, (x, dy) = layer_and_input(form, device="cuda:0")
    other, _ = layer_and_input(form, device="cuda:1")
    other.load_state_dict(layer.state_dict())
    wanted = step(layer, x, dy)
    assert torch.cuda.current_device() == 0
    found = step(other, x.to("cuda:1"), dy.to("cuda:1"))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, wanted, strict=True))
