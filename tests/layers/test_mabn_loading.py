"""MABN2d loads its own state, and the published layers' in all their shapes."""

import copy
import warnings

import pytest
import torch

from mabn_d2.layers import MABN2d
from reference import assert_equal_state, train

C, M = 3, 4
WINDOWED = ("iters", "buffer_x2", "buffer_gz")


def make_layer(**arguments):
    return MABN2d(C, **{"simulated_batch_size": 2 * M, "warmup_iters": 0, **arguments})


@pytest.mark.parametrize("iterations", [0, 6])
def test_own_state_dict(iterations):
    state = train(make_layer(), iterations).state_dict()
    assert set(state) == {"weight", "bias", "running_var", *WINDOWED}
    layer = train(make_layer(), 2)
    layer.load_state_dict(state)
    assert_equal_state(layer, state)


def published(form, layer):
    """The state of `layer` as the published layers store it."""
    state = copy.deepcopy(layer.state_dict())
    if form == "detection":
        maps = {"running_var": (1, C, 1, 1), "buffer_x2": (M, C), "iters": (1,)}
    else:
        maps = {"running_var": (1, C, 1, 1), "iters": ()}
        maps |= dict.fromkeys(("weight", "bias"), (1, C, 1, 1))
        maps |= dict.fromkeys(("buffer_x2", "buffer_gz"), (M, 1, C, 1, 1))
    return {name: value.reshape(maps.get(name, value.shape)) for name, value in state.items()}


@pytest.mark.parametrize("form", ["detection", "unit dimensions"])
def test_published_detection_form(form):
    trained = train(make_layer(), 6)
    net = torch.nn.Sequential(train(make_layer(), 2))
    state = {"0." + name: value for name, value in published(form, trained).items()}
    net.load_state_dict(state, strict=True)
    assert_equal_state(net[0], trained.state_dict())


@pytest.mark.parametrize("form", ["classification", "no windows", "no counter"])
def test_windows_that_do_not_fit_start_over_together(form):
    state = published("detection", train(make_layer(), 6))
    dropped = {"no counter": ("iters",)}.get(form, WINDOWED)
    state = {name: value for name, value in state.items() if name not in dropped}
    if form == "classification":
        state |= {"pre_x2": torch.ones(8, C), "pre_gz": torch.zeros(8, C)}
        state |= {"sta_matrix": torch.ones(8, 16), "iters": torch.tensor(6)}
    layer = train(make_layer(), 2)
    layer.load_state_dict(state, strict=True)
    assert not any(getattr(layer, name).any() for name in WINDOWED)
    assert torch.equal(layer.running_var, state["running_var"].reshape(-1))


def test_other_window_refills(caplog):
    state = train(make_layer(), 6).state_dict()
    loaded, fresh = (make_layer(simulated_batch_size=6) for _ in range(2))
    loaded.load_state_dict(state)
    assert "does not fit a window of 3" in caplog.text
    changed = make_layer()
    changed.load_state_dict(state)
    changed.configure(simulated_batch_size=6)
    for layer in loaded, changed:
        assert torch.equal(layer.running_var, state["running_var"]) and layer.iters == 0
        fresh.reset_parameters()
        fresh.running_var.copy_(state["running_var"])
        for twin in layer, fresh:
            torch.manual_seed(1)
            train(twin, 5)
        assert_equal_state(layer, fresh.state_dict())


def test_batch_norm_is_said():
    net, state = torch.nn.Sequential(make_layer(), make_layer()), {}
    for mean in (0.0, 1.0):  # of 0: BatchNorm and MABN are the same
        state = {f"{i}.{name}": torch.ones(C) for i in "01" for name in ("weight", "running_var")}
        state |= {f"{i}.running_mean": torch.full((C,), mean) for i in "01"}
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("default")
            net.load_state_dict(state, strict=False)
        assert len(found) == int(mean)
    assert "weights of BatchNorm are loaded into MABN2d" in str(found[0].message)


def test_missing_parts_are_reported():
    state = make_layer().state_dict()
    for name in "weight", "running_var":
        rest = {key: value for key, value in state.items() if key != name}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            make_layer().load_state_dict(rest)


@pytest.mark.parametrize("window", [M, 2 * M])
@pytest.mark.parametrize("with_windows", [True, False])
def test_layer_on_the_meta_device(window, with_windows):
    """State comes by assignment, or into memory that is not initialized."""
    state = train(make_layer(), 6).state_dict()
    if not with_windows:
        state = {name: value for name, value in state.items() if name not in WINDOWED}
    for assign in (True, False):
        with torch.device("meta"):
            layer = make_layer(simulated_batch_size=2 * window)
        if not assign:
            layer.to_empty(device="cpu")
            layer.rejected.fill_(7)
        layer.load_state_dict(copy.deepcopy(state), assign=assign, strict=with_windows)
        assert layer.rejected.item() == 0 and layer.iters.item() == (
            6 if with_windows and window == M else 0
        )
        train(layer, 1)
