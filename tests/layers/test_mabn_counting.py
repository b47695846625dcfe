"""What moves the state of MABN2d, and what does not."""

import copy

import pytest
import torch

from mabn_d2.layers import MABN2d
from reference import Reference, assert_close


@pytest.fixture
def layer(device):
    """A layer in its 12th iteration: windows full, r no longer 1."""
    layer = MABN2d(3, simulated_batch_size=8, warmup_iters=0, clip_start=0, device=device)
    for _ in range(11):
        layer(image(device)).square().sum().backward()
    layer.zero_grad()
    return layer


def image(device):
    return torch.randn(2, 3, 4, 5, device=device, requires_grad=True)


def state(layer):
    return copy.deepcopy(dict(layer.named_buffers()))


def assert_unmoved(layer, before):
    for name, value in layer.named_buffers():
        assert torch.equal(value, before[name]), name


def expected_eval(layer, x):
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    return x * scale[:, None, None] + layer.bias[:, None, None]


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_empty(layer, device, shape, activation):
    before, layer.activation = state(layer), activation
    x = torch.randn(shape, device=device, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [0] * 3
    assert_unmoved(layer, before)


def test_evaluation_and_frozen(layer, device):
    before = state(layer)
    x, dy = image(device), torch.randn(2, 3, 4, 5, device=device)
    for frozen in False, True:
        layer.train(frozen)
        layer.requires_grad_(not frozen)
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        y.backward(dy)
        wanted = torch.autograd.grad(expected_eval(layer, x), x, dy)[0]
        assert_close(y, expected_eval(layer, x), torch.float32)
        assert_close(x.grad, wanted, torch.float32)
    assert layer.weight.grad is None
    assert_unmoved(layer, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(layer, device, mode):
    before, x = state(layer), image(device)
    with mode():
        y = layer(x)
    assert_unmoved(layer, before)
    assert torch.equal(y, layer(x))  # normalized as in training
    assert layer.iters == before["iters"] + 1


def test_without_backward(device):
    layer = MABN2d(3, simulated_batch_size=8, warmup_iters=0, dtype=torch.double, device=device)
    reference = Reference(copy.deepcopy(layer).cpu())
    for t in range(12):
        x = torch.randn(2, 3, 4, 5, dtype=torch.double)
        inputs = x.to(device).requires_grad_()
        y = layer(inputs)
        wanted, kept = reference.forward(x)
        assert_close(y, wanted)
        if t % 3 == 0:  # two of three forwards are thrown away
            dy = torch.randn_like(x)
            y.backward(dy.to(device))
            assert_close(inputs.grad, reference.backward(kept, dy)[0])
    assert_close(layer.buffer_gz, reference.window_gz)


def test_two_forwards_before_backward(device):
    layer = MABN2d(3, simulated_batch_size=8, warmup_iters=0, dtype=torch.double, device=device)
    reference = Reference(copy.deepcopy(layer).cpu())
    for _ in range(6):
        xs = [torch.randn(2, 3, size, 5, dtype=torch.double) for size in (4, 7)]
        inputs = [x.to(device).requires_grad_() for x in xs]
        layer.zero_grad()
        ys = [layer(x) for x in inputs]
        sum(y.pow(3).sum() for y in ys).backward()
        forwards = [reference.forward(x) for x in xs]
        # Autograd runs the later forward's backward first.
        grads = [reference.backward(kept, 3 * y**2) for y, kept in reversed(forwards)][::-1]
        for x, (dx, *_) in zip(inputs, grads, strict=True):
            assert_close(x.grad, dx)
        assert_close(layer.weight.grad, grads[0][1] + grads[1][1])
    assert_close(layer.buffer_gz, reference.window_gz)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rejects_non_finite_batch(layer, device, value):
    before, other = state(layer), copy.deepcopy(layer)
    x = image(device).detach()
    x[1, 2, 3, 4] = value
    layer(x.requires_grad_()).sum().backward()
    assert layer.rejected == 1
    assert_unmoved(layer, {**before, "rejected": layer.rejected})
    x = image(device)
    assert torch.equal(layer(x), other(x)) and layer.iters == other.iters  # as if nothing had been


def test_non_finite_psi(layer, device):
    y, before = layer(image(device)), layer.buffer_gz.clone()
    dy = torch.zeros_like(y)
    dy[0, 1, 2, 3] = float("inf")
    y.backward(dy)
    assert torch.equal(layer.buffer_gz, before)
    layer(image(device)).sum().backward()
    assert layer.buffer_gz.isfinite().all() and not torch.equal(layer.buffer_gz, before)


def test_second_derivative_is_an_error(layer, operators):
    x = image(layer.weight.device)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative|differentiate twice"):
        dx.sum().backward()


def test_only_some_gradients_are_wanted(layer, operators):
    part, x = copy.deepcopy(layer), image(layer.weight.device)
    part.bias.requires_grad_(False)
    layer(x).sin().sum().backward()
    part(x.detach()).sin().sum().backward()
    assert torch.equal(part.weight.grad, layer.weight.grad) and part.bias.grad is None
    assert torch.equal(part.buffer_gz, layer.buffer_gz)
