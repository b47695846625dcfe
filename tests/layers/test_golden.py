"""Equality with traces of the published layers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mabn_d2.layers import CenConv2d, MABN2d

pytestmark = pytest.mark.usefixtures("operators")

GOLDEN = Path(__file__).parents[1] / "golden"
FORMATS = [torch.contiguous_format, torch.channels_last]


def load(name):
    with np.load(GOLDEN / name) as arrays:
        return {k: torch.from_numpy(arrays[k]) for k in arrays}


def assert_close(actual, expected):
    """Within 1e-5 of the tensor's scale: the traces are float32, sums of terms that cancel."""
    error = (actual - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max(), f"relative error {error / expected.abs().max()}"


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "name, arguments",
    [
        ("detection_window4_warmup10.npz", {"simulated_batch_size": 8, "warmup_iters": 10}),
        ("detection_window16_warmup100.npz", {}),
        ("classification_window4_batch8.npz", {"simulated_batch_size": 8, "split_batch": True}),
    ],
)
def test_layer(name, arguments, memory_format):
    trace = load(name)
    layer = MABN2d(trace["weight"].numel(), **arguments)
    kept = {int(t): k for k, t in enumerate(trace["kept"])}
    with torch.no_grad():
        layer.weight.copy_(trace["weight"])
        layer.bias.copy_(trace["bias"])
    for t, (x, grad_y) in enumerate(zip(trace["x"], trace["grad_y"], strict=True)):
        x = x.clone(memory_format=memory_format).requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(grad_y)
        if t in kept:
            k = kept[t]
            assert y.is_contiguous(memory_format=memory_format)
            assert_close(y, trace["y"][k])
            assert_close(x.grad, trace["grad_x"][k])
            assert_close(layer.weight.grad, trace["grad_weight"][k])
            assert_close(layer.bias.grad, trace["grad_bias"][k])
            assert_close(layer.running_var, trace["running_var"][k])
            state = layer.state_dict()
            for window in {"buffer_x2", "buffer_gz", "pre_x2", "pre_gz"} & trace.keys():
                assert_close(state[window], trace[window][k])
    assert_close(layer.eval()(trace["x_eval"]), trace["y_eval"])


@pytest.mark.parametrize("memory_format", FORMATS)
def test_cen_conv(memory_format):
    trace = load("cenconv.npz")
    conv = CenConv2d(4, 6, 3, stride=2, padding=1, groups=2)
    with torch.no_grad():
        conv.weight.copy_(trace["weight"])
        conv.bias.copy_(trace["bias"])
    x = trace["x"].clone(memory_format=memory_format).requires_grad_()
    y = conv(x)
    y.backward(trace["grad_y"])
    assert_close(y, trace["y"])
    assert_close(x.grad, trace["grad_x"])
    assert_close(conv.weight.grad, trace["grad_weight"])
    assert_close(conv.bias.grad, trace["grad_bias"])
