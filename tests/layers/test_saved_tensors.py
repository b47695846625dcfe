"""Every backend saves the same tensors for the backward, whether a forward is new or repeated.

Activation checkpointing compares number, shapes and dtypes of the tensors saved by the two.
"""

import pytest
import torch

from mabn_d2.layers import MABN2d
from mabn_d2.layers.ops import cpu_ops, torch_ops

BACKENDS = {"compiled": cpu_ops, "torch": torch_ops}
FORMS = {
    "ordinary": {},
    "relu": {"activation": "relu"},
    "split": {"split_batch": True},
    "split_relu": {"split_batch": True, "activation": "relu"},
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    backend = BACKENDS[request.param]
    if backend.unavailable():
        pytest.skip(backend.unavailable())
    return backend


def saved_by(function):
    """Return the result of function() and (shape, dtype) of each tensor that it saves."""
    saved = []

    def pack(tensor):
        saved.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return function(), saved


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_tensors(backend, form, dtype):
    layer = MABN2d(3, simulated_batch_size=4, **FORMS[form])
    x = torch.randn(5, 3, 4, 6, dtype=dtype, requires_grad=True)
    relu, group = layer.activation is not None, layer.batch_size if layer.split_batch else 0
    parameters = layer.weight, layer.bias, layer.buffer_gz
    state = layer.buffer_x2, layer.running_var, layer.iters, layer.rejected
    (y, statistics), saved = saved_by(
        lambda: backend.mabn(x, *parameters, *state, *layer._schedule, True, relu, group)
    )
    _, var, r, slot, use_batch_stats, _ = statistics
    given = var, r, slot, use_batch_stats
    repeated, saved_again = saved_by(
        lambda: backend.mabn_given(x, *parameters, *given, layer.eps, relu, group)
    )
    vector = ((3, 3) if group else (3,), torch.float32)
    wanted = [((5, 3, 4, 6), dtype), vector, *[((3,), torch.float32)] * relu, vector, vector]
    assert saved == saved_again == [*wanted, ((1,), torch.int64), ((1,), torch.bool)]
    assert torch.equal(y, repeated)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("repeated", [False, True])
def test_no_gradient_for_y_is_no_gradient_for_the_rest(backend, form, repeated):
    """A custom function upstream may hand None on in place of zeros."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.set_materialize_grads(False)
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    layer = MABN2d(3, simulated_batch_size=4, **FORMS[form])
    x = torch.randn(5, 3, 4, 6, requires_grad=True)
    relu, group = layer.activation is not None, layer.batch_size if layer.split_batch else 0
    parameters = layer.weight, layer.bias, layer.buffer_gz
    if repeated:
        layer(x.detach())
        given = layer.last.var, layer.last.r, layer.last.slot, layer.last.use_batch_stats
        y = backend.mabn_given(x, *parameters, *given, layer.eps, relu, group)
    else:
        state = layer.buffer_x2, layer.running_var, layer.iters, layer.rejected
        y, _ = backend.mabn(x, *parameters, *state, *layer._schedule, True, relu, group)
    (Stop.apply(y).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert layer.weight.grad is layer.bias.grad is None and not layer.buffer_gz.any()
