import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, get_norm
from torch import nn

from mabn_d2 import add_mabn_config
from mabn_d2.solver import build_optimizer


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
