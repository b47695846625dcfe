import copy

import detectron2.solver
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, get_norm
from torch import nn

from mabn_d2 import add_mabn_config
from mabn_d2.engine.value_check import CHOICES
from mabn_d2.solver import build_lr_scheduler, build_optimizer


def setup(norm="MABN", **solver):
    cfg = get_cfg()
    add_mabn_config(cfg)
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    model = nn.ModuleDict(
        {
            "conv": Conv2d(3, 4, 3, bias=False, norm=get_norm(norm, 4)),
            "frozen": Conv2d(3, 4, 3, bias=False, norm=get_norm(norm, 4)),
            "fc": nn.Linear(4, 2),
        }
    )
    model["frozen"].requires_grad_(False)
    return cfg, model


def settings(optimizer, model):
    names = {param: name for name, param in model.named_parameters()}
    return {
        names[p]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("decay_bias", [None, 0.0])
@pytest.mark.parametrize("decay_norm", [None, 0.0, 1e-2])
@pytest.mark.parametrize("norm", ["MABN", "BRN"])
def test_as_batch_norm(norm, decay_norm, decay_bias):
    solver = {
        "BASE_LR": 0.1,
        "WEIGHT_DECAY": 1e-4,
        "WEIGHT_DECAY_NORM": decay_norm,
        "WEIGHT_DECAY_BIAS": decay_bias,
        "BIAS_LR_FACTOR": 2.0,
    }
    mabn, bn = (
        settings(build_optimizer(c, m), m) for c, m in (setup(n, **solver) for n in (norm, "BN"))
    )
    assert mabn == bn and len(mabn) == 5
    assert mabn["conv.norm.weight"] == (0.1, 1e-4 if decay_norm is None else decay_norm)
    assert mabn["fc.bias"] == (0.2, 1e-4 if decay_bias is None else 0.0)


def test_optimizers():
    assert type(build_optimizer(*setup())) is torch.optim.SGD
    assert type(build_optimizer(*setup(OPTIMIZER="ADAMW"))) is torch.optim.AdamW
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER is 'ADAM'"):
        build_optimizer(*setup(OPTIMIZER="ADAM"))


@pytest.mark.parametrize("kind", ["value", "norm", "full_model"])
def test_gradient_clipping(kind):
    cfg, model = setup(BASE_LR=1.0, WEIGHT_DECAY=0.0, MOMENTUM=0.0)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    optimizer = build_optimizer(cfg, model)
    params = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    steps = [a - b.detach() for a, b in zip(before, params, strict=True)]
    if kind == "value":
        assert all(torch.allclose(s, torch.tensor(0.5)) for s in steps)
    elif kind == "norm":
        assert all(s.norm().item() == pytest.approx(0.5, rel=1e-4) for s in steps)
    else:
        total = torch.cat([s.flatten() for s in steps]).norm().item()
        assert total == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
@pytest.mark.parametrize("kind", ["value", "norm", "full_model"])
def test_clipping_of_scaled_gradients(kind, name):
    """A trainer that leaves the unscaling to GradScaler.step, as Detectron2's AMPTrainer."""
    after = []
    for scale in (1.0, 2.0**16):
        torch.manual_seed(0)
        cfg, model = setup(BASE_LR=1.0, WEIGHT_DECAY=0.0, MOMENTUM=0.0, OPTIMIZER=name)
        clip = cfg.SOLVER.CLIP_GRADIENTS
        clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, kind, 1.0
        optimizer = build_optimizer(cfg, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        params = [p for p in model.parameters() if p.requires_grad]
        scaler.scale(sum((0.01 * p).sum() for p in params)).backward()
        scaler.step(optimizer)
        after.append([p.detach() for p in params])
    torch.testing.assert_close(*after)


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
def test_steps_of_the_fused_kernels(digits_cfg, name):
    """They are the steps of torch's plain loop, and a checkpoint of the other kernels goes on."""
    digits_cfg.SOLVER.OPTIMIZER = name
    digits_cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    one, two = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    two.load_state_dict(one.state_dict())
    fused, plain = build_optimizer(digits_cfg, one), build_optimizer(digits_cfg, two)
    for group in plain.param_groups:
        group.update(fused=None, foreach=False)
    assert all(group["fused"] for group in fused.param_groups)
    for step in range(4):
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        fused.step()
        plain.step()
        if step == 1:
            state = copy.deepcopy(plain.state_dict())
            for group in state["param_groups"]:
                group.update(fused=True, foreach=None)
            fused.load_state_dict(state)
            one.load_state_dict(two.state_dict())
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", CHOICES["SOLVER.LR_SCHEDULER_NAME"])
def test_every_schedule_goes_to_the_end(name, rescale):
    """Detectron2's rates, and the last one behind the last iteration, where its steps have none."""
    cfg, model = setup(LR_SCHEDULER_NAME=name, MAX_ITER=8, STEPS=(2, 6), WARMUP_ITERS=2,
                       RESCALE_INTERVAL=rescale)  # fmt: skip
    ours, stock = (
        build(cfg, torch.optim.SGD(model.parameters(), lr=1.0))
        for build in (build_lr_scheduler, detectron2.solver.build_lr_scheduler)
    )
    for _ in range(7):
        assert ours.get_last_lr() == stock.get_last_lr()
        ours.step()
        stock.step()
    last = ours.get_last_lr()
    for _ in range(3):  # a run that is resumed past its end has more
        ours.step()
    assert ours.get_last_lr()[0] == pytest.approx(0 if "Cosine" in name else last[0], abs=1e-9)
