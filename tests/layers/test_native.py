"""The compiled CPU operators against formulas in float64, and against torch's own kernels."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mabn_d2.layers import MABN2d
from mabn_d2.layers.ops import cpu_ops
from paths import ROOT
from reference import FORMATS, assert_close

OPERATORS = cpu_ops.OPERATORS
pytestmark = pytest.mark.skipif(OPERATORS is None, reason="built without the compiled operators")
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40))
ANY_INPUT = given(
    SHAPES, st.sampled_from(DTYPES), st.sampled_from(FORMATS), st.booleans(), st.booleans()
)
DETERMINISTIC = hypothesis_settings(deadline=None, derandomize=True, max_examples=60)


def inputs(shape, dtype, memory_format, rows):
    """dy, x, three vectors: (C,), or (N, C) with `rows`, and the vectors as maps of float64."""
    torch.manual_seed(0)
    dy, x = (torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    vectors = torch.randn(3, *shape[:2]) if rows else torch.randn(3, shape[1])
    return dy, x, vectors, [v.double()[..., None, None] for v in vectors]


@DETERMINISTIC
@ANY_INPUT
def test_affine(shape, dtype, memory_format, rows, relu):
    _, x, (a, b, _), (scale, shift, _) = inputs(shape, dtype, memory_format, rows)
    y = OPERATORS.affine(x, a, b, relu)
    wanted = scale * x.double() + shift
    assert_close(y, wanted.relu() if relu else wanted, dtype)
    assert y.dtype == dtype and y.stride() == x.stride()


@DETERMINISTIC
@ANY_INPUT
def test_product_sums(shape, dtype, memory_format, rows, relu):
    dy, x, (a, b, _), (scale, shift, _) = inputs(shape, dtype, memory_format, rows)
    g = dy.double()
    if relu:
        g = torch.where(scale * x.double() + shift <= 0, 0, g)
    axes = (2, 3) if rows else (0, 2, 3)
    sums = OPERATORS.product_sums(dy, x, rows, *((a, b) if relu else (None, None)))
    for found, wanted in zip(sums, (g * x.double(), g), strict=True):
        assert found.dtype == torch.float32
        scale = wanted.abs().sum(axes).max().item()
        assert_close(found, wanted.sum(axes), found.dtype, scale=scale)


@DETERMINISTIC
@ANY_INPUT
def test_combine(shape, dtype, memory_format, rows, relu):
    dy, x, (p, q, b), (scale_dy, scale_x, shift) = inputs(shape, dtype, memory_format, rows)
    g = dy.double()
    if relu:
        g = torch.where(scale_dy * x.double() + shift <= 0, 0, g)
        dx = OPERATORS.combine(dy, x, p, q, None, b)
        wanted = scale_dy * g + scale_x * x.double()
    else:
        dx = OPERATORS.combine(dy, x, p, q, b)
        wanted = scale_dy * g + scale_x * x.double() + shift
    assert_close(dx, wanted, dtype)
    assert dx.dtype == dtype and dx.stride() == x.stride()


def test_bfloat16_is_rounded_as_torch_rounds():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    x = every.view(1, 1, 256, 256)
    for factor in 1.0, 0.7, 1 + 2**-8, 3e-39, 3e38:
        scale = torch.tensor([factor])
        y = OPERATORS.affine(x, scale, torch.zeros(1))
        wanted = (x.float() * scale).bfloat16()
        assert torch.equal(y.isnan(), wanted.isnan())
        assert torch.equal(y.nan_to_num(), wanted.nan_to_num())


def test_nan_passes_the_relu():
    x = torch.tensor([torch.nan, -1.0, 1.0, torch.inf]).view(1, 1, 2, 2)
    one, zero = torch.ones(1), torch.zeros(1)
    y = OPERATORS.affine(x, one, zero, True).flatten()
    assert y[0].isnan() and y[1:].tolist() == [0, 1, torch.inf]
    wanted = torch.ops.aten.threshold_backward(torch.ones_like(x), x, 0)
    dx = OPERATORS.combine(torch.ones_like(x), x.nan_to_num(), one, zero, None, zero)
    assert wanted.flatten().tolist() == [1, 0, 1, 1] and dx.flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("memory_format", FORMATS)
def test_results_do_not_depend_on_the_number_of_threads(memory_format):
    dy, x, (a, b, _), _ = inputs((3, 37, 65, 67), torch.float32, memory_format, False)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in 1, 2, 3:
            torch.set_num_threads(number)
            results.append([*OPERATORS.product_sums(dy, x), OPERATORS.affine(x, a, b)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


# Channels by blocks; a pass over all of them after another, as for regions of interest.
SOME, MANY = (2, 5, 7, 9), (700, 5, 7, 7)
shapes = pytest.mark.parametrize("shape", [SOME, MANY], ids=["some", "many"])


def run(layer, operators, x, dy, monkeypatch):
    """A step with these operators: y and all gradients, or y alone where dy is None."""
    monkeypatch.setattr(cpu_ops, "OPERATORS", operators)
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(leaf)
    if dy is None:
        return [y]
    y.backward(dy)
    return [y, leaf.grad, layer.weight.grad, layer.bias.grad]


@shapes
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_rejected_and_uncounted_inputs_as_with_torch(activation, memory_format, shape, monkeypatch):
    """In warm-up, window and clip phase: NaN in x, infinity in dy, forwards without gradients."""
    settings = dict(warmup_iters=6, clip_start=9, clip_limit=1.2, activation=activation)
    layers = [MABN2d(5, batch_size=1, simulated_batch_size=4, **settings) for _ in range(2)]
    for t in range(24):
        dy, x, _, _ = inputs(shape, torch.float32, memory_format, False)
        x = x * (1 + t % 5)
        if t in (3, 8, 14):
            x[0, t % 5, 2, 3] = torch.nan
        if t in (4, 7, 17):
            dy[1, 2] = torch.inf
        with torch.set_grad_enabled(t % 6 != 5):
            dy = dy if torch.is_grad_enabled() else None
            found = [
                run(layer, operators, x, dy, monkeypatch) + [*layer.last]
                for layer, operators in zip(layers, (OPERATORS, None), strict=True)
            ]
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.allclose(a.double(), b.double(), 1e-4, 1e-5, equal_nan=True)
        for a, b in zip(*(layer.buffers() for layer in layers), strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=1e-5)
    assert layers[0].rejected.item() == 3 and layers[0].iters.item() == 17


@shapes
@pytest.mark.parametrize("layer", [{}, {"activation": "relu"}, {"split_batch": True}], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_equals_that_of_torch(layer, memory_format, dtype, shape, monkeypatch):
    settings = dict(simulated_batch_size=8, warmup_iters=5, clip_start=7, **layer)
    layers = [MABN2d(5, **settings) for _ in range(2)]
    for _ in range(12):
        dy, x, _, _ = inputs((shape[0] + 1, *shape[1:]), dtype, memory_format, False)
        results = [
            run(module, operators, x, dy, monkeypatch) + [*module.buffers()]
            for module, operators in zip(layers, (OPERATORS, None), strict=True)
        ]
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            assert_close(a, b, dtype if a.is_floating_point() else torch.float32, factor=2)


def test_bad_input_is_refused():
    x, a = torch.randn(2, 3, 4, 5), torch.randn(3)
    for error, function in (
        ("float32 or bfloat16, got Double", lambda: OPERATORS.affine(x.double(), a, a)),
        ("contiguous or channels-last", lambda: OPERATORS.affine(x.mT, a, a)),
        (r"expected \(N, C, H, W\)", lambda: OPERATORS.affine(x[0], a, a)),
        ("float32 vector", lambda: OPERATORS.affine(x, a[:2], a)),
        ("float32 vector", lambda: OPERATORS.affine(x, a.double(), a)),
        ("same shape", lambda: OPERATORS.product_sums(x[:1], x)),
        ("same shape", lambda: OPERATORS.combine(x.bfloat16(), x, a, a)),
        ("scale and shift", lambda: OPERATORS.product_sums(x, x, False, a)),
    ):
        with pytest.raises(RuntimeError, match=error):
            function()


def test_installing_without_a_compiler_says_so(tmp_path):
    def setup(**variables):
        return subprocess.run(
            [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | variables,
        )  # fmt: skip

    missing = {"CXX": str(tmp_path / "no-compiler")}
    done = setup(**missing)
    assert (
        done.returncode == 0
        and "the CPU operators are left out, they need a C++ compiler" in done.stderr
    )
    done = setup(**missing, MABN_D2_NATIVE="1")
    assert done.returncode == 1 and "need a C++ compiler" in done.stderr
    # setuptools may warn of what later versions need.
    assert "operators" not in setup(**missing, MABN_D2_NATIVE="0").stderr
