"""Activation checkpointing repeats a forward in the backward; it counts once."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mabn_d2.layers import CenConv2d, MABN2d
from reference import assert_close


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
