"""torch.compile takes the layers whole, in training and evaluation, and moves the same state."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mabn_d2.layers import CenConv2d, MABN2d
from reference import assert_close

OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5)


@pytest.fixture(autouse=True)
def no_earlier_graphs():
    """Other tests' would count for the limit of recompilations, beyond which nothing is compiled."""
    torch._dynamo.reset()


def make_net(device, **arguments):
    arguments = {"simulated_batch_size": 6, "warmup_iters": 2, "clip_start": 5, **arguments}
    return torch.nn.Sequential(
        CenConv2d(3, 4, 3, padding=1),
        MABN2d(4, **arguments, activation="relu"),
        CenConv2d(4, 4, 3),
        MABN2d(4, **arguments),
    ).to(device)


@pytest.mark.parametrize("split_batch", [False, True])
def test_whole_graph(device, split_batch):
    net = make_net(device, split_batch=split_batch)
    twin = copy.deepcopy(net)
    # Inductor of torch 2.4 can't compile the split form for any number of images.
    dynamic = False if split_batch and OLD else None
    compiled = torch.compile(twin, fullgraph=True, dynamic=dynamic)
    optimizers = [torch.optim.SGD(n.parameters(), 0.1) for n in (net, twin)]
    for _ in range(12):
        x = torch.randn(5 if split_batch else 2, 3, 8, 8, device=device)
        outputs = net(x), compiled(x)
        assert_close(outputs[1], outputs[0], torch.float32, factor=10)
        for optimizer, y in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            (y - 1).square().mean().backward()
            optimizer.step()
    for value, wanted in zip(twin.buffers(), net.buffers(), strict=True):
        assert_close(value, wanted, torch.float32, factor=30)
    for value, wanted in zip(twin.parameters(), net.parameters(), strict=True):
        assert_close(value, wanted, torch.float32, factor=30)
    assert twin[1].iters == 12
    x = torch.randn(3, 3, 9, 8, device=device)
    with torch.no_grad():
        assert_close(compiled.eval()(x), net.eval()(x), torch.float32, factor=10)
    assert twin[1].iters == 12


def test_rejects_when_compiled(device):
    net = make_net(device)
    compiled = torch.compile(net, fullgraph=True)
    for value in 0.0, float("nan"), 0.0:
        x = torch.randn(2, 3, 8, 8, device=device)
        x[0, 0, 0, 0] += value
        compiled(x).sum().backward()
    assert net[1].rejected == 1 and net[1].iters == 2
    assert all(buffer.isfinite().all() for buffer in net.buffers())


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(device, compiled):
    net = make_net(device)
    run = torch.compile(net, fullgraph=True) if compiled else net
    for _ in range(8):
        x = torch.randn(2, 3, 8, 8, device=device)
        with torch.autocast(device, torch.bfloat16):
            y = run(x)
        net.zero_grad()
        y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}
    assert {b.dtype for b in net.buffers()} == {torch.float32, torch.int64}
    net.eval()
    wanted = net(x)
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        assert_close(run(x), wanted, torch.bfloat16, factor=2)


@pytest.mark.parametrize("outside", ["checkpoint", "compile"])
@pytest.mark.parametrize("split_batch", [False, True])
def test_activation_checkpointing_is_refused(split_batch, outside):
    """Compiled code would count a batch twice; with use_reentrant=True it counts it once."""
    settings = {"simulated_batch_size": 6, "warmup_iters": 2, "clip_start": 4}
    net = nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4, **settings, split_batch=split_batch))

    def compiled(function):
        return torch.compile(function, backend="aot_eager")

    if outside == "checkpoint":
        inner = compiled(net)
        run = lambda x: checkpoint(inner, x, use_reentrant=False)  # noqa: E731
    else:
        run = compiled(lambda x: checkpoint(net, x, use_reentrant=False))
    x = torch.randn(4, 3, 9, 8, requires_grad=True)
    if OLD and outside == "compile" and not split_batch:  # not compiled there, so it is repeated
        run(x).sin().sum().backward()
        assert net[1].iters == 1
        return
    # torch 2.4 refuses to compile in the repetition.
    words = (
        "symbolically trace" if OLD and outside == "checkpoint" else "can't be repeated by activ"
    )
    with pytest.raises(RuntimeError, match=words):
        run(x).sin().sum().backward()
    if outside == "checkpoint":
        plain = copy.deepcopy(net)
        for i in range(4):
            if i != 2:  # else the same batch again
                x = torch.randn(4, 3, 9, 8, requires_grad=True)
            net.zero_grad()
            plain.zero_grad()
            checkpoint(inner, x, use_reentrant=True).sin().sum().backward()
            plain(x).sin().sum().backward()
            for a, b in zip(net.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
