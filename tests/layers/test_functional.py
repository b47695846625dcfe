"""The mathematics and its passes against autograd and plain float64 formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mabn_d2.layers.functional import mabn_eval, mabn_train, push, renorm
from mabn_d2.layers.functional_split import mean_square
from mabn_d2.layers.ops import torch_ops
from mabn_d2.layers.ops.dispatch import select_backend
from mabn_d2.layers.ops.memory_format import dense, dense_like
from reference import FORMATS, LAYOUTS, TOLERANCE, assert_close

pytestmark = pytest.mark.usefixtures("operators")

EPS = 1e-3
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
ANY_INPUT = given(SIZES, st.sampled_from(list(LAYOUTS)), st.sampled_from(list(TOLERANCE)))
DETERMINISTIC = settings(deadline=None, derandomize=True, max_examples=80)


def vectors(channels, count, dtype=torch.float64):
    return (torch.rand(count, channels) + 0.5).to(torch.promote_types(dtype, torch.float32))


def broadcast(vector):
    return vector.double()[:, None, None]


def test_plain_statistics_equal_autograd(device):
    x = torch.randn(3, 5, 4, 7, dtype=torch.double, device=device, requires_grad=True)
    weight, bias = (v.to(device).requires_grad_() for v in vectors(5, 2))
    window = torch.zeros(4, 5, dtype=torch.double, device=device)
    slot, plain = torch.tensor([1], device=device), torch.tensor([True], device=device)

    def layer(x, weight, bias, relu=False):
        var = mean_square(torch_ops, x.detach())
        return mabn_train(
            x, weight, bias, var, torch.ones_like(var), EPS, window, slot, plain, relu
        )

    def formula(x, weight, bias):
        z = x / (x.square().mean((0, 2, 3), keepdim=True) + EPS).sqrt()
        return z * weight[:, None, None] + bias[:, None, None]

    dy = torch.randn_like(x)
    for relu in False, True:
        y, wanted = layer(x, weight, bias, relu), formula(x, weight, bias)
        wanted = wanted.relu() if relu else wanted
        assert_close(y, wanted)
        inputs = (x, weight, bias)
        grads = [torch.autograd.grad(out, inputs, dy) for out in (y, wanted)]
        for grad, expected in zip(*grads, strict=True):
            assert_close(grad, expected)
    assert window[1].all() and not window[[0, 2, 3]].any()


def test_push(device):
    window = torch.zeros(3, 2, device=device)
    for t in range(5):
        slot = torch.tensor([t % 3], device=device)
        value = torch.full((2,), float(t), device=device)
        mean = push(window, slot, value, torch.tensor([t != 3], device=device))
    assert window.tolist() == [[0, 0], [4, 4], [2, 2]] and mean.tolist() == [2, 2]


def test_renorm():
    var = torch.tensor([3.0, 8.0, 99.0, 0.0])
    r = renorm(var, torch.tensor([8.0, 3.0, 0.0, 99.0]), 1.0, 5.0)
    assert_close(r, torch.tensor([2 / 3, 1.5, 5.0, 0.2]), torch.float32)


@DETERMINISTIC
@ANY_INPUT
def test_passes(shape, layout, dtype):
    torch.manual_seed(0)
    x, dy = (dense(LAYOUTS[layout](torch.randn(shape).to(dtype))) for _ in range(2))
    dy = dense_like(dy, x)
    a, b = vectors(shape[1], 2, dtype)
    wide, backend = a.dtype, select_backend(x)
    products = dy.double() * x.double()
    assert_close(mean_square(backend, x), x.double().square().mean((0, 2, 3)), wide)
    product, total = backend.product_sums(dy, x)
    assert product.dtype == total.dtype == wide
    assert_close(product, products.sum((0, 2, 3)), wide, scale=products.abs().sum().item())
    assert_close(total, dy.double().sum((0, 2, 3)), wide, scale=dy.double().abs().sum().item())
    y = backend.affine(x, a, b)
    assert_close(y, broadcast(a) * x.double() + broadcast(b), dtype)
    dx = backend.combine(dy, x, a, -b)
    wanted = broadcast(a) * dy.double() - broadcast(b) * x.double()
    assert_close(dx, wanted, dtype, scale=3 * max(dy.abs().max().item(), x.abs().max().item()))
    for memory_format in FORMATS:
        same = [t.is_contiguous(memory_format=memory_format) for t in (x, y, dx)]
        assert same in ([True] * 3, [False] * 3)
    assert y.dtype == dx.dtype == dtype


@DETERMINISTIC
@ANY_INPUT
def test_eval(shape, layout, dtype):
    torch.manual_seed(0)
    x, dy = (LAYOUTS[layout](torch.randn(shape).to(dtype)) for _ in range(2))
    x.requires_grad_()
    weight, bias, var = vectors(shape[1], 3, dtype)
    weight.requires_grad_()
    y = mabn_eval(x, weight, bias, var, EPS)
    y.backward(dy)
    std = (var.double() + EPS).sqrt()
    assert y.dtype == x.grad.dtype == dtype
    assert_close(y, broadcast(weight / std) * x.double() + broadcast(bias), dtype)
    assert_close(x.grad, broadcast(weight.detach() / std) * dy.double(), dtype)
    products = dy.double() * x.detach().double()
    wanted = products.sum((0, 2, 3)) / std
    assert_close(weight.grad, wanted, dtype, scale=products.abs().sum().item())
