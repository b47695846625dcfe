"""Activation checkpointing repeats a forward in the backward; it counts once."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from mabn_d2.layers import CenConv2d, MABN2d
from mabn_d2.surgery.convert import convert_mabn
from reference import FORMATS, assert_close


def make_net(device):
    arguments = {"simulated_batch_size": 6, "warmup_iters": 2, "clip_start": 4}
    layers = [
        CenConv2d(3, 4, 3),
        MABN2d(4, **arguments, activation="relu"),
        CenConv2d(4, 4, 3),
        MABN2d(4, **arguments),
    ]
    return torch.nn.Sequential(*layers).to(device, torch.double)


def step(net, images, use_reentrant=None):
    net.zero_grad()
    for x in images:  # as the levels of a pyramid: all forwards before the backward
        assert x.grad is None
    if use_reentrant is None:
        outputs = [net(x) for x in images]
    else:
        outputs = [checkpoint(net, x, use_reentrant=use_reentrant) for x in images]
    sum(y.square().sum() for y in outputs).backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("levels", [1, 3])
def test_counts_once(device, use_reentrant, levels):
    net = make_net(device)
    plain = copy.deepcopy(net)
    for _ in range(6):
        shapes = [(2, 3, 9 + level, 8) for level in range(levels)]
        images = [torch.randn(s, dtype=torch.double, device=device) for s in shapes]
        step(plain, [x.clone().requires_grad_() for x in images])
        checked = [x.clone().requires_grad_() for x in images]
        step(net, checked, use_reentrant)
        assert all(x.grad.isfinite().all() for x in checked)
        for (name, buffer), wanted in zip(net.named_buffers(), plain.buffers(), strict=True):
            if name.endswith(("iters", "rejected")):
                assert torch.equal(buffer, wanted)
            elif not use_reentrant:
                assert_close(buffer, wanted)
        if not use_reentrant:
            for p, wanted in zip(net.parameters(), plain.parameters(), strict=True):
                assert_close(p.grad, wanted.grad, factor=10)
        if levels == 1:  # reentrant: the first forward counts nothing, its repetition does
            assert_close(net[1].buffer_x2, plain[1].buffer_x2)
            assert_close(net[1].running_var, plain[1].running_var)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_rejects_once(device, use_reentrant):
    net = make_net(device)
    for bad in 0, 1, 0:
        x = torch.randn(2, 3, 9, 8, dtype=torch.double, device=device)
        x[0, 0, 3, 3] += float("nan") if bad else 0
        step(net, [x.requires_grad_()], use_reentrant)
    assert net[1].rejected == 1 and net[1].iters == 2


def step_of(run, dtype, images):
    """Forward all images through `run`, then backward: return the outputs and the images' gradients."""
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in images]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        outputs = [run(x) for x in leaves]
    # Not y.square(): its gradient in x is next to nothing.
    sum((y.float() if y.dtype == torch.bfloat16 else y).sin().sum() for y in outputs).backward()
    return [*outputs, *(x.grad for x in leaves)]


RELU = {"fused": None, "in_place": nn.ReLU(inplace=True)}


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("relu", RELU)
@pytest.mark.parametrize("split_batch", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, "autocast"], ids=str
)
def test_every_dtype_backend_and_form(
    operators, dtype, split_batch, relu, use_reentrant, memory_format
):
    """The same y, gradients and state as without checkpointing, in warm-up, window and clip phase."""
    settings = {"simulated_batch_size": 6, "warmup_iters": 2, "clip_start": 4}
    settings |= {"split_batch": split_batch}
    middle = [MABN2d(4, **settings), RELU[relu]]
    if relu == "fused":
        middle = [MABN2d(4, **settings, activation="relu")]
    net = nn.Sequential(CenConv2d(3, 4, 3), *middle, CenConv2d(4, 4, 3), MABN2d(4, **settings))
    stored = torch.float32 if dtype == "autocast" else dtype
    net.to(stored, memory_format=memory_format)
    plain = copy.deepcopy(net)
    # Reentrant checkpointing counts a forward in its backward, so levels would count in reverse.
    levels = 1 if use_reentrant else 2
    for _ in range(6):
        images = [
            torch.randn(4, 3, 7, 6 + k, dtype=stored).contiguous(memory_format=memory_format)
            for k in range(levels)
        ]
        net.zero_grad()
        plain.zero_grad()
        found = step_of(lambda x: checkpoint(net, x, use_reentrant=use_reentrant), dtype, images)
        wanted = step_of(plain, dtype, images)
        tolerance = torch.float64 if dtype == torch.float64 else torch.float32
        if dtype in (torch.bfloat16, "autocast"):
            tolerance = torch.bfloat16
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype
            assert_close(a, b, tolerance)
        for a, b in zip(net.parameters(), plain.parameters(), strict=True):
            assert_close(a.grad, b.grad, tolerance)
        for a, b in zip(net.buffers(), plain.buffers(), strict=True):
            assert_close(
                a,
                b,
                torch.promote_types(a.dtype, torch.float32)
                if a.is_floating_point()
                else torch.float64,
            )


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("split_batch", [False, True])
def test_a_converted_network(operators, split_batch, dtype, use_reentrant):
    net = torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=3, dropout=0.0)
    settings = {"simulated_batch_size": 4, "warmup_iters": 1, "clip_start": 1}
    convert_mabn(net, split_batch=split_batch, **settings)
    net.to(dtype)
    plain = copy.deepcopy(net)
    for _ in range(3):
        x = torch.randn(3, 3, 64, 64, dtype=dtype)
        found = step_of(
            lambda x: checkpoint(net.features, x, use_reentrant=use_reentrant), dtype, [x]
        )
        wanted = step_of(plain.features, dtype, [x])
        for a, b in zip(found, wanted, strict=True):
            assert_close(a, b, dtype, factor=20)
        for a, b in zip(net.buffers(), plain.buffers(), strict=True):
            assert_close(a, b, torch.float32, factor=20)
        # The network turns a difference of one rounding in its statistics into one of 1e-3 or more.
        plain.load_state_dict(net.state_dict())


@pytest.mark.parametrize("split_batch", [False, True])
@pytest.mark.parametrize("times", [2, 3])
def test_the_same_input_again(operators, split_batch, times):
    """Two views of one batch, each with a loss of its own: each repetition has its own statistics."""
    settings = {"simulated_batch_size": 6, "warmup_iters": 2, "clip_start": 4}
    settings |= {"split_batch": split_batch}
    net = nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4, **settings), nn.ReLU(), CenConv2d(4, 4, 3),
                        MABN2d(4, **settings))  # fmt: skip
    plain = copy.deepcopy(net)
    for i in range(8):
        x = torch.randn(4, 3, 9, 8) * (1 + i % 3)
        for model, run in (
            (plain, plain),
            (net, lambda x: checkpoint(net, x, use_reentrant=False)),
        ):
            model.zero_grad()
            sum((n + 1) * (run(x) + n).sin().sum() for n in range(times)).backward()
        for a, b in zip(net.parameters(), plain.parameters(), strict=True):
            assert_close(a.grad, b.grad, torch.float32, factor=10)
        for a, b in zip(net.buffers(), plain.buffers(), strict=True):
            assert_close(a, b, torch.float32 if a.is_floating_point() else torch.float64)


@pytest.mark.parametrize("split_batch", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("between", [True, False])
def test_the_same_input_without_gradients(operators, split_batch, use_reentrant, between):
    """A metric of the batch, in training mode: it was not counted, and what is repeated counts once."""
    settings = {"simulated_batch_size": 6, "warmup_iters": 2, "split_batch": split_batch}
    net = nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4, **settings))
    plain = copy.deepcopy(net)
    for _ in range(4):
        x = torch.randn(4, 3, 9, 8, requires_grad=True)
        for model, run in (
            (plain, plain),
            (net, lambda x: checkpoint(net, x, use_reentrant=use_reentrant)),
        ):
            model.zero_grad()
            if not between:  # counted, and not repeated
                model(x).sum()
            loss = run(x).sin().sum()
            if between:
                with torch.no_grad():
                    model(x)
            loss.backward()
        for a, b in zip(net.parameters(), plain.parameters(), strict=True):
            assert_close(a.grad, b.grad, torch.float32, factor=10)
        for a, b in zip(net.buffers(), plain.buffers(), strict=True):
            assert_close(a, b, torch.float32 if a.is_floating_point() else torch.float64)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_nested(outer, inner):
    """The inner checkpoint repeats what the outer one repeats."""
    net = make_net("cpu")
    plain = copy.deepcopy(net)

    def run(x):
        return checkpoint(lambda x: checkpoint(net, x, use_reentrant=inner), x, use_reentrant=outer)

    for _ in range(8):
        x = torch.randn(2, 3, 9, 8, dtype=torch.double, requires_grad=True)
        for model, forward in ((plain, plain), (net, run)):
            model.zero_grad()
            forward(x).sin().sum().backward()
        for a, b in zip(net.parameters(), plain.parameters(), strict=True):
            assert_close(a.grad, b.grad, factor=10)
        for a, b in zip(net.buffers(), plain.buffers(), strict=True):
            assert_close(a, b)
