"""Split BatchNorm and Batch Renormalization equal the ordinary layers group by group."""

import copy

import pytest
import torch
from torch import nn

from mabn_d2.layers import BatchRenorm2d, SplitBatchNorm2d, SplitBatchRenorm2d
from reference import FORMATS, TOLERANCE, assert_close

RENORM = {"warmup_iters": 1, "r_max_iter": 3, "d_max_iter": 3}
PAIRS = {
    "BN": (lambda: SplitBatchNorm2d(3, 2), lambda: nn.BatchNorm2d(3)),
    "BRN": (lambda: SplitBatchRenorm2d(3, 2, **RENORM), lambda: BatchRenorm2d(3, **RENORM)),
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_ordinary_layer_group_by_group(device, name, dtype, memory_format):
    """One copy of the ordinary layer a group, from the same state; their states' mean after it."""
    make_split, make_plain = PAIRS[name]
    wide = torch.promote_types(dtype, torch.float32)
    split = make_split().to(device, wide)
    with torch.no_grad():
        split.weight.copy_(torch.tensor([0.5, 1, 1.5]))
        split.bias.copy_(torch.tensor([-0.2, 0.1, 0.2]))
    for t, n in enumerate((8, 7, 4, 6, 2, 1)):
        x = 3 + torch.randn(n, 3, 4, 5) * (1 + t)
        dy = torch.randn(n, 3, 4, 5)
        x, dy = (v.to(device, dtype).contiguous(memory_format=memory_format) for v in (x, dy))
        plain = make_plain().to(device, torch.float64)
        plain.load_state_dict(split.state_dict())
        groups = [copy.deepcopy(plain) for _ in x.split(2)]
        inputs, reference = x.clone().requires_grad_(), x.double().requires_grad_()
        split.zero_grad()
        y = split(inputs)
        y.backward(dy)
        assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
        expected = [layer(group) for layer, group in zip(groups, reference.split(2))]
        expected = torch.cat(expected)
        expected.backward(dy.double())
        scale = expected.abs().max().item()
        assert_close(y, expected, dtype, factor=2)
        assert_close(inputs.grad, reference.grad, dtype, factor=8, scale=scale)
        for k in ("weight", "bias"):
            total = sum(getattr(layer, k).grad for layer in groups)
            assert_close(getattr(split, k).grad, total, dtype, factor=4, scale=dy.numel() ** 0.5)
        for k in ("running_mean", "running_var"):
            mean = sum(getattr(layer, k) for layer in groups) / len(groups)
            assert_close(getattr(split, k), mean, dtype, factor=2)
        assert split.num_batches_tracked == t + 1
    plain.load_state_dict(split.state_dict())
    assert_close(split.eval()(x), plain.eval()(x.double()), dtype)


@pytest.mark.parametrize("name", PAIRS)
def test_one_value_a_channel_and_wrong_shape_are_refused(name):
    layer = PAIRS[name][0]()
    assert layer(torch.randn(4, 3, 1, 1)).isfinite().all()
    with pytest.raises(ValueError, match="in each group of 2 images"):
        layer(torch.randn(3, 3, 1, 1))
    with pytest.raises(ValueError):
        layer(torch.randn(4, 5, 2, 2))
    assert layer(torch.randn(0, 3, 2, 2)).shape == (0, 3, 2, 2)
