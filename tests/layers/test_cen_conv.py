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
