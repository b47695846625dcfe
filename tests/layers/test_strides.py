"""Any layout: views, sizes of 1, an output gradient in another layout than the input.

What a tensor's strides are in a dimension of size 1 says nothing, and differs between tensors of the
same memory format. Slices of a batch, concatenation, pooling and `expand` make such tensors.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mabn_d2.layers import BatchRenorm2d, MABN2d, SplitBatchNorm2d, SplitBatchRenorm2d
from reference import assert_close

pytestmark = pytest.mark.usefixtures("operators")

CHANNELS_LAST = torch.channels_last
# Views of tensors with the values of a contiguous x, or (expand, pool) with values of their own.
VIEWS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=CHANNELS_LAST),
    "slice_of_batch": lambda x: torch.cat([x, x])[len(x) :],
    "slice_of_batch_channels_last": lambda x: torch.cat([x, x]).contiguous(
        memory_format=CHANNELS_LAST
    )[: len(x)],
    "every_other_image": lambda x: x.repeat_interleave(2, 0)[::2],
    "half_of_channels": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "half_of_channels_last": lambda x: torch.cat([x, x], 1).contiguous(memory_format=CHANNELS_LAST)[
        :, : x.shape[1]
    ],
    "crop": lambda x: F.pad(x, (1, 2, 1, 0))[:, :, 1:, 1:-2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch_inside": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expand": lambda x: x[:, :, :1, :1].expand_as(x),
    "expand_batch": lambda x: x[:1].expand_as(x),
    "pooled_channels_last": lambda x: F.adaptive_avg_pool2d(
        x.repeat_interleave(2, 2).contiguous(memory_format=CHANNELS_LAST), x.shape[2:]
    ),
    "unit_strides": lambda x: x.as_strided(
        x.shape, [s if n > 1 else 7 for n, s in zip(x.shape, x.stride(), strict=True)]
    ),
}
C = 3
LAYERS = {
    "mabn": lambda: MABN2d(C, simulated_batch_size=4, warmup_iters=0, clip_start=0),
    "mabn_relu": lambda: MABN2d(C, simulated_batch_size=4, warmup_iters=0, activation="relu"),
    "split": lambda: MABN2d(C, simulated_batch_size=4, warmup_iters=0, split_batch=True),
    "split_relu": lambda: MABN2d(
        C, simulated_batch_size=4, warmup_iters=0, split_batch=True, activation="relu"
    ),
    "split_bn": lambda: SplitBatchNorm2d(C, 2),
    "brn": lambda: BatchRenorm2d(C, warmup_iters=0, r_max_iter=2, d_max_iter=2),
    "split_brn": lambda: SplitBatchRenorm2d(C, 2, warmup_iters=0, r_max_iter=2, d_max_iter=2),
}
ONE_OR_MORE = st.sampled_from([1, 1, 2, 5])
ANY = given(
    st.tuples(st.sampled_from([1, 1, 2, 5]), ONE_OR_MORE, ONE_OR_MORE),
    st.sampled_from(list(VIEWS)),
    st.sampled_from(list(VIEWS)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.booleans(),
)


@pytest.mark.parametrize("name", LAYERS)
@settings(deadline=None, derandomize=True, max_examples=25)
@ANY
def test_layout_changes_no_result(name, size, view, dy_view, dtype, training):
    n, h, w = size
    if name in ("brn", "split_bn", "split_brn"):
        # BatchNorm needs two values a channel, and magnifies the rounding of (almost) equal values.
        h = max(h, 2)
        view = "crop" if "expand" in view else view
    torch.manual_seed(0)
    layer = LAYERS[name]().to(torch.promote_types(dtype, torch.float32)).train(training)
    twin = copy.deepcopy(layer)
    for _ in range(4):
        x, dy = (1 + torch.rand(2, n, C, h, w)).to(dtype).sub_(0.3)
        x, dy = VIEWS[view](x).detach(), VIEWS[dy_view](dy)
        wanted_x = x.clone(memory_format=torch.contiguous_format).requires_grad_()
        x.requires_grad_()
        y, wanted = layer(x), twin(wanted_x)
        y.backward(dy)
        wanted.backward(dy.clone(memory_format=torch.contiguous_format))
        limit = torch.float32 if dtype == torch.float64 else dtype
        assert y.dtype == x.grad.dtype == dtype
        assert_close(y, wanted, limit, factor=2)
        assert_close(x.grad, wanted_x.grad, limit, factor=2, scale=dy.abs().max().item() * 3)
        for found, expected in zip(layer.parameters(), twin.parameters(), strict=True):
            scale = dy.abs().sum().item()
            assert_close(found.grad, expected.grad, limit, factor=2, scale=scale)
        for found, expected in zip(layer.buffers(), twin.buffers(), strict=True):
            assert_close(found, expected, limit, factor=2)


@pytest.mark.parametrize("name", LAYERS)
def test_one_image_with_a_concatenation_behind(name):
    """DeepLabV3+'s decoder and UPerNet's pooling pyramid, with one image."""
    layer, pooled = LAYERS[name](), LAYERS[name]()
    x = torch.randn(1, C, 6, 5).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    small = pooled(F.adaptive_avg_pool2d(x, (2, 1)))
    y = torch.cat([layer(x), F.interpolate(small, (6, 5)), x], 1)
    y.square().sum().backward()
    assert x.grad.isfinite().all() and layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_size, dy_size", [(150, 1), (1e-2, 1e-5)])
def test_half_precision_of_any_size(name, dtype, x_size, dy_size):
    """Squares and products leave the range of float16, or lose digits, long before their float32 sums."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    twin = copy.deepcopy(layer)
    for _ in range(3):
        x, dy = torch.randn(2, 4, C, 6, 5)
        x, dy = (x * x_size).to(dtype), (dy * dy_size).to(dtype)
        layer(x.contiguous(memory_format=CHANNELS_LAST)).backward(
            dy.contiguous(memory_format=CHANNELS_LAST)
        )
        twin(x).backward(dy)
    for a, b in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=0)
    for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * dy_size)
