"""Dtypes, copies and arguments of MABN2d."""

import copy
import io
import pickle

import pytest
import torch

from mabn_d2.layers import BatchRenorm2d, MABN2d, SplitMABN2d
from reference import assert_close, assert_equal_state, train

C, M = 3, 4


def make_layer(**arguments):
    return MABN2d(C, **{"simulated_batch_size": 2 * M, "warmup_iters": 0, **arguments})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_conversion(dtype):
    layer = train(make_layer(), 6)
    before = copy.deepcopy(layer.state_dict())
    layer.to(dtype)
    statistics = torch.promote_types(dtype, torch.float32)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert {getattr(layer, n).dtype for n in ("running_var", "buffer_x2", "buffer_gz")} == {
        statistics
    }
    assert_equal_state(layer.float(), before)  # statistics went through no narrower dtype
    layer.to(dtype)
    x = torch.randn(2, C, 4, 5, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == dtype and layer.iters == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [MABN2d, SplitMABN2d, BatchRenorm2d])
def test_assigned_state(kind, dtype):
    """A file whose tensors all have one dtype, the counter too, as they are after a cast."""
    state = {name: value.to(dtype) for name, value in train(kind(C), 3).state_dict().items()}
    layer = kind(C)
    layer.load_state_dict(state, assign=True)
    statistics = torch.promote_types(dtype, torch.float32)
    assert layer.weight.dtype == dtype
    assert {buffer.dtype for buffer in layer.buffers()} == {statistics, torch.int64}
    layer(torch.randn(2, C, 4, 5, dtype=dtype)).float().sum().backward()
    counter = layer.state_dict()["num_batches_tracked" if kind is BatchRenorm2d else "iters"]
    assert counter == 4 and layer.running_var.isfinite().all()


@pytest.mark.parametrize("layer_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_input_of_another_dtype(layer_dtype, dtype):
    layer = train(make_layer(), 6).to(layer_dtype)
    for training in True, False:
        x = torch.randn(2, C, 4, 5, dtype=dtype, requires_grad=True)
        twin = copy.deepcopy(layer).double().train(training)
        y, wanted = layer.train(training)(x), twin(x.double())
        y.sum().backward()
        assert y.dtype == x.grad.dtype == dtype and layer.weight.grad.dtype == layer_dtype
        assert_close(y, wanted, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def through_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), through_file],
    ids=["deepcopy", "pickle", "file"],
)
def test_copies_go_on_alike(duplicate):
    layer = train(make_layer(clip_start=0), 6)
    other = duplicate(layer)
    for twin in layer, other:
        torch.manual_seed(1)
        train(twin, 3)
    assert_equal_state(other, layer.state_dict())
    train(other)
    assert layer.iters == 9 and other.iters == 10  # nothing is shared


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_features": 0}, "num_features must be positive, got 0"),
        ({"batch_size": 3}, r"\(32\) must be a positive multiple of batch_size \(3\)"),
        ({"batch_size": 0}, "batch_size"),
        ({"simulated_batch_size": 0}, r"simulated_batch_size \(0\) must be a positive multiple"),
        ({"eps": 0.0}, "eps is out of range: 0.0"),
        ({"momentum": 1.5}, "momentum is out of range: 1.5"),
        ({"warmup_iters": -1}, "warmup_iters is out of range: -1"),
        ({"clip_start": -1}, "clip_start is out of range: -1"),
        ({"clip_limit": 0.5}, "clip_limit is out of range: 0.5"),
        ({"activation": "gelu"}, 'activation must be None or "relu", got .gelu.'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MABN2d(**{"num_features": C, **arguments})
    with pytest.raises(TypeError, match="no argument window"):
        make_layer().configure(window=3)


@pytest.mark.parametrize("shape", [(2, C, 4), (C, 4, 5), (2, C + 1, 4, 5), (2, C, 4, 5, 6)])
def test_bad_input(shape):
    with pytest.raises(ValueError, match=rf"\(N, {C}, H, W\), got \({shape[0]}, "):
        make_layer()(torch.randn(shape))


def test_extra_repr():
    assert repr(make_layer(activation="relu")) == (
        "MABN2d(3, eps=1e-05, momentum=0.98, batch_size=2, simulated_batch_size=8, "
        "warmup_iters=0, clip_start=1000, clip_limit=5.0, activation=relu)"
    )
    assert "activation" not in repr(make_layer())
