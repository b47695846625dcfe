"""Several batches for one optimizer step: one backward after another, or one for several forwards."""

import copy

import pytest
import torch

from mabn_d2.layers import MABN2d

FORMS = {
    "ordinary": {"simulated_batch_size": 6},
    "split": {"batch_size": 2, "simulated_batch_size": 6, "split_batch": True},
}


@pytest.fixture(params=FORMS)
def layer(request):
    """A layer whose windows are full, and two batches for it."""
    layer = MABN2d(3, warmup_iters=1, clip_start=2, **FORMS[request.param]).double()
    for _ in range(6):
        layer(batch()).pow(3).sum().backward()
    layer.zero_grad()
    return layer


def batch():
    return torch.randn(4, 3, 5, 5, dtype=torch.double).requires_grad_()


def results(layer, xs):
    return {
        **layer.state_dict(),
        "grad": layer.weight.grad,
        **{f"dx{k}": x.grad for k, x in enumerate(xs)},
    }


def test_gradients_accumulate(layer):
    other, xs = copy.deepcopy(layer), [batch(), batch()]
    for x in xs:
        layer(x).pow(3).sum().backward()
    accumulated, total = results(layer, xs), 0
    copies = [x.detach().requires_grad_() for x in xs]
    for x in copies:
        other.zero_grad()
        other(x).pow(3).sum().backward()
        total = total + other.weight.grad
    assert layer.iters == other.iters == 8
    torch.testing.assert_close(accumulated, {**results(other, copies), "grad": total})


def test_forwards_before_their_backwards(layer):
    """Each backward is that of its own forward: the same as one after the other."""
    other, xs = copy.deepcopy(layer), [batch(), batch()]
    for y in [layer(x) for x in xs]:
        y.pow(3).sum().backward()
    copies = [x.detach().requires_grad_() for x in xs]
    for x in copies:
        other(x).pow(3).sum().backward()
    assert layer.iters == 8
    torch.testing.assert_close(results(layer, xs), results(other, copies))


def test_one_backward_for_two_forwards(layer):
    """As autograd does it: what was computed last comes first."""
    other, xs = copy.deepcopy(layer), [batch(), batch()]
    sum(layer(x).pow(3).sum() for x in xs).backward()
    copies = [x.detach().requires_grad_() for x in xs]
    for y in [other(x) for x in copies][::-1]:
        y.pow(3).sum().backward()
    assert layer.iters == 8
    torch.testing.assert_close(results(layer, xs), results(other, copies))
