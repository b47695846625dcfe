"""What only CUDA has: fp16 with a gradient scaler, graph capture. No synchronization anywhere."""

import copy

import pytest
import torch
import torch.utils.checkpoint

from mabn_d2.layers import CenConv2d, MABN2d
from reference import assert_close

pytestmark = pytest.mark.gpu


def make_net():
    arguments = {"simulated_batch_size": 6, "warmup_iters": 2, "clip_start": 5}
    return torch.nn.Sequential(
        CenConv2d(3, 4, 3, padding=1),
        MABN2d(4, **arguments, activation="relu"),
        CenConv2d(4, 4, 3),
        MABN2d(4, **arguments),
    ).cuda()


def step(net, x):
    y = net(x)
    (y - 1).square().mean().backward()
    return y


def test_no_synchronization():
    net, x = make_net(), torch.randn(2, 3, 8, 8, device="cuda")
    step(net, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            step(net, x)
        for use_reentrant in False, True:
            y = torch.utils.checkpoint.checkpoint(
                net, x.requires_grad_(), use_reentrant=use_reentrant, preserve_rng_state=False
            )
            y.sum().backward()
        net.eval()(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert net[1].iters == 11


def test_fp16_with_gradient_scaler():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)  # overflows at first
    for _ in range(40):
        x = torch.randn(2, 3, 8, 8, device="cuda")
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            y = net(x)
            loss = (y.float() - 1).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert y.dtype == torch.float16 and scaler.get_scale() < 2.0**40
    assert net[1].iters == 40 and net[1].rejected == 0
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_graph_capture():
    net = make_net()
    twin = copy.deepcopy(net)
    images = torch.randn(12, 2, 3, 8, 8, device="cuda")
    x = images[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(net, x)
    torch.cuda.current_stream().wait_stream(stream)
    net.load_state_dict(twin.state_dict())
    net.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # is recorded, not run
        y = step(net, x)
    for image in images:
        for parameter in net.parameters():
            parameter.grad.zero_()
        twin.zero_grad()
        x.copy_(image)
        graph.replay()
        assert_close(y, step(twin, image), torch.float32, factor=10)
        for p, wanted in zip(net.parameters(), twin.parameters(), strict=True):
            assert_close(p.grad, wanted.grad, torch.float32, factor=30)
    for buffer, wanted in zip(net.buffers(), twin.buffers(), strict=True):
        assert_close(buffer, wanted, torch.float32, factor=10)
    assert net[1].iters == 12
