"""CenConv2d is nn.Conv2d with centred filters, whatever the arguments."""

import pytest
import torch
import torch.nn.functional as F

from mabn_d2.layers import CenConv2d, center_weight
from reference import FORMATS, assert_close

ARGUMENTS = [
    {"kernel_size": 1},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "bias": False},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2},
    {"kernel_size": 3, "padding": "same", "groups": 4},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_convolution_with_centred_filters(device, arguments, memory_format, dtype):
    conv = CenConv2d(4, 8, **arguments, device=device, dtype=dtype).to(memory_format=memory_format)
    plain = torch.nn.Conv2d(4, 8, **arguments, device=device, dtype=torch.double)
    x = torch.randn(2, 4, 9, 8, device=device).to(dtype).contiguous(memory_format=memory_format)
    filters = conv.weight.detach().double()
    filters -= filters.flatten(1).mean(1)[:, None, None, None]
    plain.load_state_dict({**conv.state_dict(), "weight": filters})
    wanted, y = plain(x.double()), conv(x)
    assert y.dtype == dtype and (y.shape[1] == 1 or y.is_contiguous(memory_format=memory_format))
    assert_close(y, wanted, dtype)
    dy = torch.randn_like(y)
    y.backward(dy)
    wanted.backward(dy.double())
    grad = plain.weight.grad  # its mean gets no gradient, as the weight's has no effect
    assert_close(conv.weight.grad, grad - grad.mean((1, 2, 3), keepdim=True), dtype)
    if conv.bias is not None:
        assert_close(conv.bias.grad, plain.bias.grad, dtype)


def test_zero_mean_outputs():
    x = torch.randn(2, 4, 9, 8) + 100
    conv = CenConv2d(4, 8, 3, bias=False).double()
    x = x.double() - x.double().mean((0, 2, 3), keepdim=True) + 100  # equal means over channels
    assert (
        conv(x).mean((0, 2, 3)).abs().max()
        < 0.1 * F.conv2d(x, conv.weight).mean((0, 2, 3)).abs().max()
    )
    assert_close(center_weight(conv.weight).sum((1, 2, 3)), torch.zeros(8), scale=1)


def test_is_a_conv2d():
    conv, plain = CenConv2d(4, 8, 3, groups=2), torch.nn.Conv2d(4, 8, 3, groups=2)
    conv.load_state_dict(plain.state_dict(), strict=True)
    assert repr(conv) == "Cen" + repr(plain)
    before = conv.weight.clone()
    conv(torch.randn(1, 4, 5, 5))
    assert torch.equal(conv.weight, before)  # the stored weight stays free


def test_meta_device():
    conv = CenConv2d(4, 8, 3, device="meta", dtype=torch.bfloat16)
    assert conv(torch.empty(2, 4, 9, 8, device="meta", dtype=torch.bfloat16)).shape == (2, 8, 7, 6)


def plain(conv, x):
    return F.conv2d(x, center_weight(conv.weight), conv.bias, conv.stride, conv.padding)


@pytest.mark.parametrize("shape", [(4, 9, 8), (2, 4, 9, 8)])
def test_images_without_a_batch(shape, device):
    conv, x = CenConv2d(4, 6, 3, padding=1, device=device), torch.randn(shape, device=device)
    torch.testing.assert_close(conv(x), plain(conv, x))
    conv(x).sum().backward()
    assert conv.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float64])
def test_inputs_of_another_dtype(dtype, device):
    """nn.Conv2d's error, with and without gradients."""
    conv, x = CenConv2d(3, 4, 3, device=device), torch.zeros(1, 3, 6, 6, dtype=dtype, device=device)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), pytest.raises(RuntimeError, match="type"):
            conv(x)


@pytest.mark.parametrize("layer", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_under_autocast(layer, dtype, device):
    """As nn.Conv2d: float64 is left alone."""
    conv = CenConv2d(3, 4, 3, device=device, dtype=layer)
    stock = torch.nn.Conv2d(3, 4, 3, device=device, dtype=layer)
    x = torch.zeros(1, 3, 6, 6, dtype=dtype, device=device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        if layer == dtype:
            assert conv(x).dtype == stock(x).dtype
        else:
            for one in (conv, stock):
                with pytest.raises(RuntimeError, match="type"):
                    one(x)


def test_second_derivative(device):
    """A gradient penalty."""
    conv = CenConv2d(3, 4, 3, device=device, dtype=torch.float64)
    grads = []
    for forward in (conv, lambda x: plain(conv, x)):
        x = torch.ones(2, 3, 5, 5, device=device, dtype=torch.float64, requires_grad=True)
        loss = forward(x * torch.arange(5, device=device)).square().sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        grads.append(torch.autograd.grad(dx.square().sum() + loss, [*conv.parameters(), x]))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted)


def test_transforms(device):
    """torch.func and forward-mode differentiation."""
    conv, x = CenConv2d(3, 4, 3, device=device), torch.randn(5, 3, 6, 6, device=device)
    state = {name: value.detach() for name, value in conv.named_parameters()}

    def loss(state, x):
        return torch.func.functional_call(conv, state, (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(state, x)
    for i, image in enumerate(x):
        conv.zero_grad()
        plain(conv, image[None]).square().sum().backward()
        torch.testing.assert_close(found["weight"][i], conv.weight.grad, rtol=1e-4, atol=1e-4)
    _, tangent = torch.func.jvp(conv, (x,), (x,))
    torch.testing.assert_close(tangent, plain(conv, x) - conv.bias[:, None, None])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        found = torch.autograd.forward_ad.unpack_dual(conv(dual)).tangent
    torch.testing.assert_close(found, tangent)
