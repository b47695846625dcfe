"""MABN2d equals its formulas in training, in every dtype, memory layout and shape."""

import pytest
import torch

from mabn_d2.layers import MABN2d
from reference import FORMATS, LAYOUTS, TOLERANCE, Reference, assert_close


def layer_and_reference(channels=3, device="cpu", dtype=torch.float64, **arguments):
    layer = MABN2d(channels, **arguments, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 1.5, channels))
        layer.bias.copy_(torch.linspace(-0.2, 0.2, channels))
    reference = Reference(layer)
    return layer.to(device), reference


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("simulated", [2, 8, 18])  # window 1 (none), shorter and longer than T
def test_equals_formula(device, memory_format, activation, simulated):
    layer, reference = layer_and_reference(
        device=device,
        activation=activation,
        simulated_batch_size=simulated,
        warmup_iters=7,
        clip_start=15,
        clip_limit=1.5,
    )
    clipped = False
    for t in range(40):
        # The scale wanders, so that r leaves [1 / 1.5, 1.5] on both sides.
        x = torch.randn(2, 3, 4, 5, dtype=torch.double) * (1 + 3 * (t % 11 > 6)) + 0.1
        dy = torch.randn_like(x)
        inputs = x.to(device).contiguous(memory_format=memory_format).requires_grad_()
        y = layer(inputs)
        layer.zero_grad()
        y.backward(dy.to(device))
        expected, kept = reference.forward(x)
        dx, dweight, dbias = reference.backward(kept, dy)
        clipped |= bool((kept[2] == 1.5).any())
        for actual, wanted in [
            (y, expected),
            (inputs.grad, dx),
            (layer.weight.grad, dweight),
            (layer.bias.grad, dbias),
            (layer.running_var, reference.running_var),
            (layer.buffer_x2, reference.window_x2),
            (layer.buffer_gz, reference.window_gz),
        ]:
            assert_close(actual, wanted)
        assert y.is_contiguous(memory_format=memory_format)
        assert inputs.grad.is_contiguous(memory_format=memory_format)
    assert clipped and layer.iters == 40


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 1), (3, 5, 7, 3), (2, 33, 9, 8)])
def test_dtypes_layouts_and_shapes(device, layout, dtype, activation, shape):
    layer, reference = layer_and_reference(
        shape[1],
        device,
        torch.promote_types(dtype, torch.float32),
        activation=activation,
        simulated_batch_size=4,
        warmup_iters=0,
        clip_start=0,
    )
    for _ in range(4):  # the last two use both windows and r
        x, dy = (LAYOUTS[layout](torch.randn(shape).to(device, dtype)) for _ in range(2))
        x.requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        assert y.dtype == x.grad.dtype == dtype
        if layout in ("contiguous", "channels_last"):
            assert y.stride() == x.stride() == x.grad.stride()
        expected, kept = reference.forward(x)
        *kept, positive = kept
        if activation:  # rounding decides about y near 0
            positive = y.detach().cpu() > 0
        dx, dweight, dbias = reference.backward((*kept, positive), dy)
        scale = (1.5 * dy.abs().max() / kept[1].min().sqrt()).item()
        assert_close(y, expected, dtype)
        assert_close(x.grad, dx, dtype, factor=2, scale=scale)
        assert_close(layer.weight.grad, dweight, dtype, factor=2)
        assert_close(layer.bias.grad, dbias, dtype)
