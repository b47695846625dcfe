"""Settings of built layers: NumPy's numbers, assignment, the two forms, what torch.jit.script says."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from mabn_d2.layers import BatchRenorm2d, CenConv2d, MABN2d, MABNAct2d, SplitMABN2d, SplitMABNAct2d
from mabn_d2.layers.base import ConfigurableNorm

NORMS = [MABN2d, SplitMABN2d, BatchRenorm2d]
each_norm = pytest.mark.parametrize("norm", NORMS)


@each_norm
@pytest.mark.parametrize(
    "number", [np.float32, np.float64, np.int64, lambda n: torch.tensor(float(n)), float]
)
def test_numbers_of_other_types(norm, number):
    """np.float32 settings used to be a TypeError in the compiled operator."""
    layer, wanted = norm(3), norm(3)
    settings = {name: max(1, kind(getattr(layer, name))) for name, kind in norm.SETTINGS.items()}
    wanted.configure(**settings)
    layer.configure(**{name: number(value) for name, value in settings.items()})
    for name, kind in norm.SETTINGS.items():
        value = getattr(layer, name)
        assert type(value) is kind and value == getattr(wanted, name)
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(layer(x), wanted(x))


@each_norm
def test_what_is_no_such_number_is_refused(norm):
    layer = norm(3)
    before = {name: getattr(layer, name) for name in norm.SETTINGS}
    for settings, message in (
        ({"eps": "small"}, "eps must be a number, got 'small'"),
        ({"eps": float("nan")}, "eps is out of range: nan"),
        ({"momentum": 1.5}, "momentum is out of range: 1.5"),
        ({"warmup_iters": 2.5}, "warmup_iters must be a whole number, got 2.5"),
        ({"warmup_iters": float("inf")}, "warmup_iters must be a whole number, got inf"),
        ({"eps": 1e-3, "warmup_iters": None}, "warmup_iters must be a whole number, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.configure(**settings)
        assert before == {name: getattr(layer, name) for name in norm.SETTINGS}
    with pytest.raises(TypeError, match=f"{norm.__name__} has no argument window_size"):
        layer.configure(window_size=3)


@each_norm
def test_assignment_is_configuration(norm):
    layer, wanted = norm(3), norm(3)
    wanted.configure(eps=1e-2, warmup_iters=1)
    layer.eps, layer.warmup_iters = 1e-2, 1
    with pytest.raises(ValueError, match="momentum is out of range: -1"):
        layer.momentum = -1
    x = torch.randn(4, 3, 5, 5)
    for _ in range(4):
        assert torch.equal(layer(x), wanted(x))
    if norm is not BatchRenorm2d:
        layer.simulated_batch_size = 8
        assert layer.window == 4 and layer.iters == 0
        assert layer._schedule[2:4] == layer._thresholds(4)


FORMS = [
    (MABN2d, SplitMABN2d, {}),
    (MABNAct2d, SplitMABNAct2d, {"drop": nn.Identity(), "act": nn.ReLU()}),
]


@pytest.mark.parametrize("ordinary, split, parts", FORMS)
def test_both_forms(ordinary, split, parts):
    made = ordinary(3, **parts, simulated_batch_size=8, split_batch=True)
    assert type(made) is split and isinstance(made, MABN2d) and made.split_batch
    assert type(ordinary(3, **parts, split_batch=False)) is ordinary
    with pytest.raises(ValueError, match=f"{split.__name__} has split_batch=True, got False"):
        split(3, **parts, split_batch=False)
    layer = ordinary(3, **parts, simulated_batch_size=8)
    x = torch.randn(6, 3, 4, 4)
    layer(x).sum().backward()
    layer.configure(split_batch=True)
    assert type(layer) is split and layer.iters == 0 and not layer.buffer_x2.any()
    layer.running_var.fill_(1)
    for twin in (layer, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(twin) is split and torch.equal(twin(x), copy.deepcopy(made)(x))
    assert list(layer.state_dict())[:6] == list(made.state_dict())[:6]
    assert {"pre_x2", "pre_gz"} < layer.state_dict().keys()
    layer.configure(split_batch=False)
    assert type(layer) is ordinary and "buffer_x2" in layer.state_dict()


def test_another_class_keeps_its_form():
    class Own(MABN2d):
        pass

    with pytest.raises(ValueError, match="Own has split_batch=False, got True"):
        Own(3, split_batch=True)
    with pytest.raises(TypeError, match="Own cannot change split_batch"):
        Own(3).configure(split_batch=True)


@pytest.mark.parametrize("build", [MABN2d, SplitMABN2d])
def test_script_names_the_remedy(build):
    net = nn.Sequential(nn.Sequential(CenConv2d(3, 4, 3), build(4)), nn.ReLU()).eval()
    with pytest.raises(RuntimeError, match=f"{build.__name__}: .*fold_mabn"):
        torch.jit.script(net)


def test_base_is_abstract():
    with pytest.raises(NotImplementedError):
        ConfigurableNorm(3).configure()
