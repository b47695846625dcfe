"""Under a loss scale that moves, gradients and windows are those of a loss that is not scaled."""

import copy

import pytest
import torch
from torch import nn

from mabn_d2 import MABN2d, rescale_mabn_windows


def make_scaler():
    return torch.amp.GradScaler("cpu", 2.0**10, growth_interval=3)


@pytest.mark.parametrize("split_batch", [False, True])
def test_gradients_under_any_scale(split_batch):
    settings = {"simulated_batch_size": 8, "warmup_iters": 1, "split_batch": split_batch}
    plain, net = (nn.Sequential(MABN2d(3, **settings)) for _ in range(2))
    scaler = make_scaler()
    for t in range(14):
        if t == 8:  # a run is resumed with a scale that changes in its first iteration
            state = copy.deepcopy([m.state_dict() for m in (plain, net, scaler)])
            net, scaler = nn.Sequential(MABN2d(3, **settings)), make_scaler()
        if t in (8, 11):  # 11: back to an earlier state in the same process
            for module, saved in zip((plain, net, scaler), state, strict=True):
                module.load_state_dict(saved)
        x, dy = torch.randn(2, 4, 3, 5, 5)
        grads = []
        for model, scale in ((plain, 1.0), (net, scaler.scale(torch.ones(())))):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            ((model(leaf) * dy).sum() * scale).backward()
            grads.append([grad / scale for grad in (leaf.grad, model[0].weight.grad)])
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)
        scaler.step(torch.optim.SGD(net.parameters(), 0.0))
        scaler.update()
        rescale_mabn_windows(net, scaler)
        scale = rescale_mabn_windows(net, scaler)  # a second call changes nothing
        torch.testing.assert_close(net[0].buffer_gz / scale, plain[0].buffer_gz)
    assert scale == 2.0**13 and plain[0].buffer_gz.any()


def test_a_scaler_that_is_disabled():
    layer = MABN2d(3)
    layer.buffer_gz.fill_(2.0)
    assert rescale_mabn_windows(layer, torch.amp.GradScaler("cpu", enabled=False)) == 1
    assert layer.buffer_gz.eq(2).all()
    rescale_mabn_windows(layer, make_scaler())
    assert layer.buffer_gz.eq(2 * 2.0**10).all()
