"""The statistics hook: what it writes equals an independent computation, and nothing when off."""

import json
import runpy

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from mabn_d2.engine import Trainer
from mabn_d2.engine.statistics import LogStatistics
from mabn_d2.layers import CenConv2d, MABN2d

from conftest import ROOT

COMMON = {"window": 2, "momentum": 0.75}


def run(norm, iterations=5):
    """Train one norm layer under the hook; return the storage and every (x, dy)."""
    net = nn.Sequential(CenConv2d(3, 4, 3), norm)
    nn.init.uniform_(norm.weight, 0.5, 2)
    hook = LogStatistics(net, 1, **COMMON)
    seen = []
    norm.register_forward_hook(lambda m, a, y: seen.append([a[0].detach()]))
    with EventStorage() as storage:
        hook.trainer = type("Trainer", (), {"iter": 0})()
        hook.before_train()
        for hook.trainer.iter in range(iterations):
            y = net(torch.randn(2, 3, 8, 8))
            dy = torch.randn_like(y)
            y.backward(dy)
            seen[-1].append(dy)
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
        assert history(storage, f"{name}/{kind}") == pytest.approx([w.item() for w in wanted],
                                                                    abs=1e-5), (name, kind)


def test_batch_norm():
    storage, seen, norm = run(nn.BatchNorm2d(4))
    mean = [x.mean((0, 2, 3)) for x, _ in seen]
    var = [x.var((0, 2, 3), correction=0) for x, _ in seen]
    z = [(x - m.view(-1, 1, 1)) / (v + 1e-5).sqrt().view(-1, 1, 1)
         for (x, _), m, v in zip(seen, mean, var)]
    g = [dy * norm.weight.detach().view(-1, 1, 1) for _, dy in seen]
    check(storage, "mean", mean)
    check(storage, "var", var)
    check(storage, "g", [t.mean((0, 2, 3)) for t in g])
    check(storage, "psi", [(a * b).mean((0, 2, 3)) for a, b in zip(g, z)])


def test_mabn():
    norm = MABN2d(4, simulated_batch_size=4, momentum=0.75, warmup_iters=1, clip_start=3,
                  clip_limit=1.2)
    storage, seen, _ = run(norm, iterations=6)
    check(storage, "x2", [x.square().mean((0, 2, 3)) for x, _ in seen])
    # The layer's own windows are those of the hook: 2 iterations, filled.
    assert history(storage, "x2/window")[-1] == pytest.approx(norm.buffer_x2.mean().item())
    assert history(storage, "psi/window")[-1] == pytest.approx(norm.buffer_gz.mean().item())
    assert history(storage, "r/batch")[:3] == [1, 1, 1] != history(storage, "r/batch")[3:]
    shares = history(storage, "r_clipped/batch")
    assert shares[:3] == [0, 0, 0] and shares[3] > 0 and all(4 * s == int(4 * s) for s in shares)


def test_training_writes_and_the_tool_draws(digits_cfg, tmp_path, capsys):
    digits_cfg.DATASETS.TEST = ()
    digits_cfg.SOLVER.MAX_ITER = 2
    trainer = Trainer(digits_cfg)
    assert not any(isinstance(hook, LogStatistics) for hook in trainer._hooks)
    digits_cfg.MODEL.MABN.LOG_PERIOD = 1
    Trainer(digits_cfg).train()
    lines = (tmp_path / "output/metrics.json").read_text().splitlines()
    names = {key.split("/")[1] for key in json.loads(lines[-1]) if key.startswith("statistics/")}
    assert len(names) == 3 and any("fpn" in n or "res" in n for n in names)
    tool = runpy.run_path(str(ROOT / "tools/plot_statistics.py"))
    picture = tmp_path / "statistics.png"
    tool["main"]([digits_cfg.OUTPUT_DIR, "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no statistics of stem: use one of"):
        tool["main"]([digits_cfg.OUTPUT_DIR, "--layer", "stem"])
    digits_cfg.MODEL.MABN.LOG_LAYERS = ("stem",)
    with pytest.raises(ValueError, match="'stem'; there are backbone"):
        Trainer(digits_cfg)
