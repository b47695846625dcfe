"""Every YAML of the repository builds, takes a training step and infers."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from inputs import training_inputs
from mabn_d2 import add_mabn_config
from mabn_d2.layers import BatchRenorm2d, MABN2d
from mabn_d2.solver import build_optimizer
from paths import ROOT
from repository_configs import load, narrow

CONFIGS = sorted(str(p.relative_to(ROOT / "configs")) for p in ROOT.glob("configs/**/*.yaml"))
BASES = [name for name in CONFIGS if name.startswith("Base-")]
LEAVES = [name for name in CONFIGS if name not in BASES]
MODEL_BASES = [name for name in BASES if "own-data" not in name]
PUBLISHED = [name for name in LEAVES if not name.startswith(("digits", "own_data"))]


def norms(cfg):
    """The NORM keys that the model of `cfg` uses, by node."""
    nodes = {"RetinaNet": ["RETINANET"], "PanopticFPN": ["SEM_SEG_HEAD", "ROI_BOX_HEAD"]}
    names = nodes.get(cfg.MODEL.META_ARCHITECTURE, ["ROI_BOX_HEAD"])
    names += ["ROI_MASK_HEAD"] if cfg.MODEL.MASK_ON else []
    return {name: cfg.MODEL[name].NORM for name in ["RESNETS", "FPN", *names]}


def step(cfg):
    model = build_model(cfg)
    semantic = cfg.MODEL.META_ARCHITECTURE == "PanopticFPN"
    inputs = training_inputs(96, 96, semantic)
    optimizer = build_optimizer(cfg, model)
    before = [p.detach().clone() for p in model.parameters()]
    with EventStorage():
        sum(model.train()(inputs).values()).backward()
    optimizer.step()
    after = list(model.parameters())
    assert all(p.isfinite().all() for p in after)
    moved = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert moved > 0.9 * len(after)
    with torch.no_grad():
        outputs = model.eval()(inputs[:1])[0]
    assert "instances" in outputs and ("panoptic_seg" in outputs) == semantic
    return model


@pytest.mark.parametrize("name", LEAVES)
def test_narrow(name):
    cfg = narrow(name)
    (norm,) = set(norms(cfg).values())
    model = step(cfg)
    kind = {
        "MABN": MABN2d,
        "BRN": BatchRenorm2d,
        "BN": torch.nn.BatchNorm2d,
        "SyncBN": torch.nn.SyncBatchNorm,
        "GN": torch.nn.GroupNorm,
    }[norm]
    names = {"MABN": "build_mabn_resnet_fpn_backbone"}
    builder = names.get(norm, "build_any_norm_resnet_fpn_backbone")
    if "compare" in name:  # its rows set the norm
        builder = "build_any_norm_resnet_fpn_backbone"
    if "retinanet" in name:  # with P6 and P7
        builder = "build_retinanet_resnet_fpn_backbone"
    assert builder == cfg.MODEL.BACKBONE.NAME
    # Bottom-up, FPN and heads of the smallest model, RetinaNet's: 5 levels, 8 norms in its head.
    assert sum(isinstance(m, kind) for m in model.modules()) >= (20 if "digits" in name else 53 + 6)


@pytest.mark.parametrize("name", MODEL_BASES)
def test_base_without_a_norm(name):
    step(narrow(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODEL_BASES + LEAVES)
def test_full_size(name):
    step(load(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_leaves_are_small_and_named_after_what_they_are(name):
    lines = (ROOT / "configs" / name).read_text().splitlines()
    cfg = load(name)
    stem = name.removeprefix("larger_backbones/").removesuffix(".yaml")
    assert len(lines) <= 15 and f"output/{stem}" == cfg.OUTPUT_DIR
    assert set(norms(cfg).values()) == {
        {"mabn": "MABN", "brn": "BRN", "bn": "BN", "syncbn": "SyncBN", "gn": "GN"}[
            stem.split("_")[-2]
        ]
    }
    original = get_cfg()
    add_mabn_config(original)
    original.merge_from_file(str(ROOT / "configs" / name))
    assert (original.MODEL.WEIGHTS == "") == stem.startswith("scratch_")
    assert (50 if "R50" in name else 101) == cfg.MODEL.RESNETS.DEPTH
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (180000, (120000, 160000))
