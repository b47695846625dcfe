import pytest
import torch
from torch import nn

from mabn_d2.layers import BatchRenorm2d

SCHEDULE = {
    "momentum": 0.9,
    "warmup_iters": 3,
    "r_max": 1.5,
    "r_max_iter": 7,
    "d_max": 0.2,
    "d_max_iter": 5,
}
VIEW = (1, -1, 1, 1)


class Reference:
    """The formula of the paper (algorithm 1) in float64, gradients by autograd."""

    def __init__(self, num_features):
        self.mean, self.var = torch.zeros(num_features).double(), torch.ones(num_features).double()

    def __call__(self, x, weight, bias, t):
        mean = x.mean((0, 2, 3))
        centred = x - mean.view(VIEW)
        var = (centred**2).mean((0, 2, 3))
        r_limit = {4: 1.125, 5: 1.25, 6: 1.375}.get(t, 1.0 if t <= 3 else 1.5)
        d_limit = {4: 0.1}.get(t, 0.0 if t <= 3 else 0.2)
        sigma = (self.var + 1e-5).sqrt()
        r = ((var + 1e-5).sqrt() / sigma).detach().clamp(1 / r_limit, r_limit)
        d = ((mean - self.mean) / sigma).detach().clamp(-d_limit, d_limit)
        z = centred / (var + 1e-5).sqrt().view(VIEW) * r.view(VIEW) + d.view(VIEW)
        self.mean = 0.9 * self.mean + 0.1 * mean.detach()
        self.var = 0.9 * self.var + 0.1 * var.detach()
        return z * weight.view(VIEW) + bias.view(VIEW)


def batches(count, channels=5):
    """Float64 inputs whose mean and scale change from batch to batch, so that the limits act."""
    for t in range(1, count + 1):
        x = torch.randn(2, channels, 4, 3).double() * torch.linspace(0.3, 3, channels).view(VIEW)
        yield t, x * (1 + 0.3 * t % 2) + 0.4 * torch.randn(channels).double().view(VIEW)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-11)])
def test_equals_the_formula(dtype, tolerance, memory_format):
    layer, reference = BatchRenorm2d(5, **SCHEDULE, dtype=dtype), Reference(5)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    weight, bias = (p.detach().double().requires_grad_() for p in layer.parameters())
    for t, wide in batches(10):
        wide = wide.to(dtype).double().requires_grad_()
        x = wide.detach().to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        dy = torch.randn_like(x)
        layer.zero_grad()
        y, wanted = layer(x), reference(wide, weight, bias, t)
        y.backward(dy)
        gradients = torch.autograd.grad(wanted, (wide, weight, bias), dy.double())
        assert y.is_contiguous(memory_format=memory_format) and y.dtype == dtype
        for actual, expected in zip(
            (y, layer.running_mean, layer.running_var, x.grad, layer.weight.grad, layer.bias.grad),
            (wanted, reference.mean, reference.var, *gradients),
            strict=True,
        ):
            assert (actual - expected).abs().max() <= tolerance * expected.abs().max(), t
    assert layer.num_batches_tracked == 10
    sigma = (reference.var + 1e-5).sqrt().view(VIEW)
    wanted = (wide - reference.mean.view(VIEW)) / sigma * weight.view(VIEW) + bias.view(VIEW)
    assert (layer.eval()(x) - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_is_batch_norm_at_first():
    layer, plain = BatchRenorm2d(4), nn.BatchNorm2d(4)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 4, 6, 6) * 7 + 3
    torch.testing.assert_close(layer(x), plain(x))
    plain.num_batches_tracked.fill_(30)
    layer.load_state_dict(plain.state_dict())
    assert layer.num_batches_tracked == 30
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    old = {k: v for k, v in plain.state_dict().items() if k != "num_batches_tracked"}
    layer.load_state_dict(old)


def state(layer):
    return [buffer.clone() for buffer in layer.buffers()]


def test_what_does_not_move_the_state():
    layer = BatchRenorm2d(4, **SCHEDULE)
    for _, x in batches(6, channels=4):
        layer(x.float())
    before = state(layer)
    bad = torch.randn(2, 4, 3, 3)
    bad[0, 1, 0, 0] = torch.nan
    layer(bad)
    with torch.no_grad():
        trained = layer(x.float())
    assert not torch.allclose(trained, layer.eval()(x.float()), atol=1e-3)
    empty = torch.zeros(0, 4, 3, 3, requires_grad=True)
    layer.train()(empty).sum().backward()
    assert empty.grad.shape == empty.shape and not layer.weight.grad.any()
    layer.weight.requires_grad_(False)
    torch.testing.assert_close(layer.train()(x.float()), layer.eval()(x.float()))
    assert all(map(torch.equal, state(layer), before))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    layer, wide = (BatchRenorm2d(4, **SCHEDULE) for _ in range(2))
    narrow = BatchRenorm2d(4, **SCHEDULE).to(dtype)
    assert narrow.running_var.dtype == torch.float32
    for _, x in batches(6, channels=4):
        x = x.to(dtype)
        y, low, wanted = layer(x), narrow(x), wide(x.float())
        assert y.dtype == low.dtype == dtype
        torch.testing.assert_close(y.float(), wanted, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(low, y)
    torch.testing.assert_close(layer.running_var, wide.running_var, rtol=1e-5, atol=0)


def test_clear_errors():
    for name, value in {"eps": 0, "momentum": 1.1, "r_max": 0.5, "d_max": -1}.items():
        with pytest.raises(ValueError, match=f"{name} is out of range: {value}"):
            BatchRenorm2d(4, **{name: value})
    with pytest.raises(ValueError, match=r"r_max_iter \(10\) must not be before warmup_iters \(20"):
        BatchRenorm2d(4, warmup_iters=20, r_max_iter=10)
    with pytest.raises(TypeError, match="no argument r_maximum"):
        BatchRenorm2d(4).configure(r_maximum=2)
    with pytest.raises(ValueError, match=r"\(N, 4, H, W\), got \(2, 3, 8, 8\)"):
        BatchRenorm2d(4)(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchRenorm2d(4)(torch.zeros(1, 4, 1, 1))
