"""The statistics hook: what it writes equals an independent computation, and nothing when off."""

import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mabn_d2.engine import Trainer
from mabn_d2.engine.hooks.log_statistics import LogStatistics, forward_order
from mabn_d2.layers import CenConv2d, MABN2d

COMMON = {"window": 2, "momentum": 0.75}


def run(norm, iterations=5, bad=None, scaler=None):
    """Train one norm layer under the hook; return the storage, every (x, dy), the state after each.

    Iteration `bad` has a NaN.
    """
    net = nn.Sequential(CenConv2d(3, 4, 3), norm)
    nn.init.uniform_(norm.weight, 0.5, 2)
    hook = LogStatistics(net, 1, **COMMON, grad_scaler=scaler)
    seen = []
    norm.register_forward_hook(lambda m, a, y: seen.append([a[0].detach()]))
    with EventStorage() as storage:
        hook.trainer = type("Trainer", (), {"iter": 0})()
        hook.before_train()
        for hook.trainer.iter in range(iterations):
            x = torch.randn(2, 3, 8, 8)
            if hook.trainer.iter == bad:
                x[0, 0, 0, 0] = math.nan
            y = net(x)
            dy = torch.randn_like(y)
            y.backward(scaler.scale(dy) if scaler else dy)
            seen[-1] += [dy, {key: value.clone() for key, value in norm.state_dict().items()}]
            hook.after_step()
            storage.step()
        hook.after_train()
    assert not net[1]._backward_hooks and len(net[1]._forward_hooks) == 1
    return storage, seen, norm


def history(storage, name):
    return [value for value, _ in storage.history(f"statistics/1/{name}").values()]


def averages(values):
    """(window of 2, EMA of 0.75), both averaged over the channels."""
    window = [torch.stack(values[max(i - 1, 0) : i + 1]).mean() for i in range(len(values))]
    ema, emas = values[0], []
    for value in values:
        ema = 0.75 * ema + 0.25 * value
        emas.append(ema.mean())
    return window, emas


def check(storage, name, values):
    window, ema = averages(values)
    for kind, wanted in (("batch", [v.mean() for v in values]), ("window", window), ("ema", ema)):
        assert history(storage, f"{name}/{kind}") == pytest.approx(
            [w.item() for w in wanted], abs=1e-5
        ), (name, kind)


def independent(seen, norm):
    """The statistics of each (x, dy, ...) of a BatchNorm, computed again."""
    weight = norm.weight.detach().view(-1, 1, 1)
    for x, dy, _ in seen:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        z = (x - mean.view(-1, 1, 1)) / (var + 1e-5).sqrt().view(-1, 1, 1)
        yield {
            "mean": mean,
            "var": var,
            "g": (dy * weight).mean((0, 2, 3)),
            "psi": (dy * weight * z).mean((0, 2, 3)),
        }


@pytest.mark.parametrize("scaled", [False, True])
def test_batch_norm(scaled):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    storage, seen, norm = run(nn.BatchNorm2d(4), scaler=scaler)
    values = list(independent(seen, norm))
    for name in ("mean", "var", "g", "psi"):
        check(storage, name, [v[name] for v in values])


def test_a_bad_batch_enters_no_average():
    storage, seen, norm = run(nn.BatchNorm2d(4), iterations=6, bad=2)
    values = [v for k, v in enumerate(independent(seen, norm)) if k != 2]
    for name in ("mean", "psi"):
        batch = history(storage, f"{name}/batch")
        assert [math.isnan(v) for v in batch] == [k == 2 for k in range(6)]
        window, ema = averages([v[name] for v in values])
        for kind, wanted in (("window", window), ("ema", ema)):
            found = history(storage, f"{name}/{kind}")[3:]
            assert found == pytest.approx([w.item() for w in wanted[2:]], abs=1e-6), (name, kind)
    storage, _, norm = run(mabn(), iterations=6, bad=0)
    for key in ("x2/window", "x2/ema", "psi/window", "psi/ema"):
        assert all(map(math.isfinite, history(storage, key))), key


def mabn():
    return MABN2d(
        4, simulated_batch_size=4, momentum=0.75, warmup_iters=1, clip_start=3, clip_limit=1.2
    )


@pytest.mark.parametrize("scaled", [False, True])
def test_mabn(scaled):
    scale = 1024.0 if scaled else 1.0
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scaled else None
    storage, seen, norm = run(mabn(), iterations=6, scaler=scaler)
    states = [state for _, _, state in seen]

    def check_all(name, wanted):
        assert history(storage, name) == pytest.approx([w.item() for w in wanted], rel=1e-4), name

    x2 = [x.square().mean((0, 2, 3)) for x, _, _ in seen]
    check_all("x2/batch", [v.mean() for v in x2])
    # The first iteration has written one row of two.
    rows = [1, 2, 2, 2, 2, 2]
    check_all("x2/window", [2 * s["buffer_x2"].mean() / n for s, n in zip(states, rows)])
    check_all("x2/ema", [s["running_var"].mean() for s in states])
    psi = [2 * s["buffer_gz"].mean() / n / scale for s, n in zip(states, rows)]
    check_all("psi/window", psi)
    assert history(storage, "psi/batch")[0] == pytest.approx(psi[0].item(), rel=1e-4)
    raw = [((v + 1e-5) / (s["running_var"] + 1e-5)).sqrt() for v, s in zip(x2, states)]
    check_all("r/batch", [r.mean() for r in raw])
    assert history(storage, "r/window")[:3] == [1, 1, 1] != history(storage, "r/window")[3:]
    assert history(storage, "r/window")[-1] == pytest.approx(norm.last.r.mean().item())
    shares = history(storage, "r_clipped/window")
    assert shares[:3] == [0, 0, 0] and shares[3] > 0 and all(4 * s == int(4 * s) for s in shares)


class Synchronizations(TorchDispatchMode):
    """Counts what waits for the device: `item`, `bool` and, which is patched, `tolist`."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))

    def tolist(self, tensor):
        self.count += 1
        return [0.0] * len(tensor)


@pytest.mark.parametrize("norm", [mabn(), nn.BatchNorm2d(4)], ids=["MABN", "BN"])
def test_waits_for_the_device_only_when_it_writes(norm, monkeypatch):
    net = nn.Sequential(CenConv2d(3, 4, 3), norm)
    scaler = torch.amp.GradScaler("cpu")
    hook = LogStatistics(net, 3, **COMMON, grad_scaler=scaler)
    hook.trainer = type("Trainer", (), {"iter": 0})()
    hook.before_train()
    counts = []
    with EventStorage():
        for hook.trainer.iter in range(3):
            with Synchronizations() as mode:
                monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: mode.tolist(tensor))
                scaler.scale(net(torch.randn(2, 3, 8, 8)).sum()).backward()
                hook.after_step()
            counts.append(mode.count)
    assert counts == [0, 0, 1]


def test_default_layers_follow_the_forward(digits_cfg):
    hook = LogStatistics(Trainer.build_model(digits_cfg), 1)
    assert list(hook.layers) == [
        "backbone.bottom_up.stem.conv1.norm",
        "backbone.fpn_lateral2.norm",  # 12 norms of 24 are in front of it
        "roi_heads.mask_head.mask_fcn2.norm",
    ]
    names = [
        "roi_heads.box_head.conv1.norm",
        "backbone.fpn_lateral2.norm",
        "backbone.bottom_up.res2.0.conv1.norm",
        "backbone.bottom_up.stem.conv1.norm",
    ]
    assert sorted(sorted(names), key=forward_order) == [names[3], names[2], names[1], names[0]]
