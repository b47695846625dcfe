"""What the Triton backend must compute, for any way to run it: interpreter, PTX emulator or GPU."""

import copy

import pytest
import torch

from mabn_d2.layers import MABN2d, SplitMABN2d
from mabn_d2.layers.ops import torch_ops, triton_ops, triton_plan
from reference import assert_close

FORMS = ["ordinary", "split"]
BATCH = 2  # of the split form


def laid_out(values, memory_format, offset=0):
    """Return a copy of (N, C, H, W) in a memory format that begins `offset` elements into memory."""
    channels_last = memory_format == torch.channels_last
    moved = values.permute(0, 2, 3, 1) if channels_last else values
    room = moved.new_zeros(offset + moved.numel())
    room[offset:] = moved.reshape(-1)
    view = room[offset:].view(moved.shape)
    return view.permute(0, 3, 1, 2) if channels_last else view


def check_passes(shape, rows, memory_format, dtype, device="cpu", offset=0):
    """`affine`, `combine`, `product_sums` and `square_sums` against float64.

    Args:
        rows: whether vectors have a row for each image.
        offset: of x, in elements; dy begins where memory is aligned.
    """
    dy, x = torch.randn(2, *shape, device=device).to(dtype)
    dy, x = laid_out(dy, memory_format), laid_out(x, memory_format, offset)
    vectors = torch.randn(4, *shape[:2] if rows else shape[1:2], device=device)
    a, b, c, d = vectors
    scale, shift, scale_x, other = vectors.double()[..., None, None]
    g, value = dy.double(), x.double()
    for found, wanted in (
        (triton_ops.affine(x, a, b), scale * value + shift),
        (triton_ops.affine(x, a, b, True), (scale * value + shift).relu()),
        (triton_ops.combine(dy, x, a, c), scale * g + scale_x * value),
        (triton_ops.combine(dy, x, a, c, d), scale * g + scale_x * value + other),
    ):
        assert_close(found, wanted, dtype)
        assert found.dtype == dtype and found.stride() == torch.empty_like(x).stride()
    axes = (2, 3) if rows else (0, 2, 3)
    products, totals = triton_ops.product_sums(dy, x, rows)
    squares = triton_ops.square_sums(x, rows)
    for found, terms in (products, g * value), (totals, g), (squares, value.square()):
        assert found.dtype == torch.float32
        size = terms.abs().sum(axes).max().item()
        assert_close(found, terms.sum(axes), found.dtype, scale=size)


def assert_same(found, wanted, dtype, scale=None):
    """Equal within tolerance where `wanted` is finite, and not finite elsewhere."""
    finite = wanted.isfinite().cpu()
    assert torch.equal(found.isfinite().cpu(), finite)
    zero = torch.zeros(())
    found, wanted = (values.cpu().where(finite, zero) for values in (found, wanted))
    assert_close(found, wanted, dtype, factor=2, scale=scale)


def one_pixel_scale(layer, dy):
    """Return the size of the two terms of dx, which cancel if a channel has one pixel; else None."""
    if dy[:, 0].numel() > 1:
        return None
    factor = layer.weight.float() * layer.last.r * (layer.last.var + layer.eps).rsqrt()
    return (
        (dy.float() * factor.reshape(1, -1, 1, 1)).nan_to_num(posinf=0, neginf=0).abs().max().item()
    )


# Iterations of `check_layer`: warm-up, window, clipping; and what happens in some of them.
STEPS, FEW_STEPS = range(14), range(6, 10)
NAN_X, INF_DY, NO_GRAD = (7, 11), 8, (3, 12)


def check_layer(
    form,
    relu,
    memory_format,
    dtype,
    shape=(3, 6, 7, 6),
    device="cpu",
    steps=STEPS,
    offset=0,
    parameter_dtype=torch.float32,
):
    """All of a layer's iterations against torch's kernels in float32 on the CPU."""
    settings = {"eps": 1e-4, "momentum": 0.7, "warmup_iters": 6, "clip_start": 9, "clip_limit": 1.2}
    kind = SplitMABN2d if form == "split" else MABN2d
    batch = {"batch_size": BATCH, "simulated_batch_size": 4 * BATCH}
    layer = kind(shape[1], **batch, **settings, activation="relu" if relu else None)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    layer.weight.data, layer.bias.data = (
        p.detach().to(parameter_dtype) for p in (layer.weight, layer.bias)
    )
    layer.iters.fill_(steps[0])  # windows: as if their rows were those of iterations before
    if steps[0]:
        layer.buffer_x2.uniform_(0.5, 2)
        layer.buffer_gz.normal_()
    twin = copy.deepcopy(layer).to(device)
    rejected = 0
    for t in steps:
        dy, x = (torch.randn(2, *shape) * (1 + t % 3)).to(dtype)
        if t in NAN_X:
            x[0, t % shape[1], 0, 0] = torch.nan
        if t == INF_DY:
            dy[0, 0, 0, 0] = torch.inf
        update = t not in NO_GRAD
        rejected += t in NAN_X
        own = laid_out(x.to(device), memory_format, offset).requires_grad_()
        leaf = x.to(torch.float32, copy=True).requires_grad_()
        layer.zero_grad()
        twin.zero_grad()
        with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(update):
            patch.setattr("mabn_d2.layers.mabn.select_backend", lambda *_, **__: torch_ops)
            wanted = layer(leaf)
            if device == "cpu":
                patch.setattr("mabn_d2.layers.mabn.select_backend", lambda *_, **__: triton_ops)
            y = twin(own)
            if update:
                wanted.backward(dy.float())
                y.backward(laid_out(dy.to(device), memory_format))
        assert y.stride() == torch.empty_like(own).stride()
        assert_same(y, wanted, dtype)
        assert_same_statistics(twin.last, layer.last, form)
        pairs = list(zip(twin.buffers(), layer.buffers(), strict=True))
        if update:
            assert_same(own.grad, leaf.grad, dtype, one_pixel_scale(layer, dy))
            for p, q in zip(twin.parameters(), layer.parameters(), strict=True):
                assert p.grad.dtype == p.dtype
                assert_same(p.grad, q.grad, max(torch.float32, p.dtype, key=_coarseness))
        for found, expected in pairs:
            assert found.dtype == expected.dtype
            assert_same(found, expected, torch.float32)
    assert twin.rejected.item() == rejected


def _coarseness(dtype):
    return torch.finfo(dtype).eps


def assert_same_statistics(found, wanted, form):
    for name, value, expected in zip(wanted._fields, found, wanted, strict=True):
        assert value.dtype == expected.dtype and value.shape == expected.shape
        if not (name == "slot" and form == "split"):  # which does not use it
            assert_same(value, expected, torch.float32)


def check_same_relu_both_ways(memory_format=torch.contiguous_format):
    """dx passes exactly the elements that y does, where scale * x + shift is next to zero, too."""
    x = laid_out(torch.randn(2, 3, 40, 50), memory_format).requires_grad_()
    layer = MABN2d(3, activation="relu")
    torch.nn.init.normal_(layer.weight)
    # One pixel of each channel of an image is about zero in front of the ReLU.
    scale = layer.weight.detach() / (x.detach().square().mean((0, 2, 3)) + layer.eps).sqrt()
    layer.bias.data = -scale * x.detach()[0, :, 0, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mabn_d2.layers.mabn.select_backend", lambda *_, **__: triton_ops)
        y = layer(x)
        y.backward(torch.ones_like(y))
    passed = (y > 0).sum((0, 2, 3)).float()
    assert torch.equal(layer.bias.grad, passed)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


def check_no_gradient():
    """A backward without dy gives no gradients and leaves the window of psi as it is."""
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    psi_window, window, running_var = torch.ones(4, 3), torch.zeros(4, 3), torch.ones(3)
    counters = torch.zeros(2, 1, dtype=torch.int64).unbind()
    schedule = (1e-5, 0.98, 4, 1000, 5.0, True, False)
    y, _ = triton_ops.mabn(x, weight, bias, psi_window, window, running_var, *counters, *schedule)
    (_NoGradient.apply(y).sum() + 0 * x.sum()).backward()
    assert weight.grad is None and bias.grad is None and not x.grad.any()
    assert torch.equal(psi_window, torch.ones(4, 3))


def forget_plans():
    """Forget the plans, which the constants of triton_plan have gone into."""
    for name in ("layer_plan", "affine_plan", "combine_plan", "sums_plan"):
        getattr(triton_plan, name).cache_clear()
