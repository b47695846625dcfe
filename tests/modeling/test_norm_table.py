"""A norm that is added to the table is found by everything that looks norms up."""

from argparse import Namespace

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.modeling import build_model
from detectron2.solver import get_default_optimizer_params
from torch import nn

from mabn_d2.benchmark.norms import choose_norms, detectron2_norms, known_norms, layer_norms
from mabn_d2.classification.models import build_classifier, norm_names
from mabn_d2.engine.config_check import ConfigError, check_config
from mabn_d2.engine.hooks.log_statistics import LogStatistics
from mabn_d2.engine.lazy_trainer import check
from mabn_d2.engine.resume import check_same_run
from mabn_d2.modeling.norm_table import (
    NORMS,
    NormType,
    configure_norms_by_name,
    set_num_groups,
)
from mabn_d2.solver import build_optimizer
from paths import ROOT


class ToyNorm(nn.Module):
    """A scale and a bias."""

    def __init__(self, num_features, factor=1.0, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features, device=device))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device))
        self.configure(factor=factor)

    def configure(self, factor=None):
        if factor is not None and factor <= 0:
            raise ValueError(f"factor is out of range: {factor}")
        self.factor = self.factor if factor is None else factor

    def forward(self, x):
        return x * (self.weight * self.factor)[:, None, None] + self.bias[:, None, None]


@pytest.fixture
def toy(monkeypatch):
    def settings(cfg):
        return {"factor": cfg.MODEL.TOY.FACTOR} if "TOY" in cfg.MODEL else {}

    monkeypatch.setitem(NORMS, "TOY", NormType(ToyNorm, settings))


@pytest.fixture
def toy_cfg(toy, digits_cfg):
    for node in (digits_cfg.MODEL.RESNETS, digits_cfg.MODEL.FPN):
        node.NORM = "TOY"
    digits_cfg.MODEL.BACKBONE.NAME = "build_any_norm_resnet_fpn_backbone"
    digits_cfg.MODEL.TOY = CfgNode({"FACTOR": 0.5})
    return digits_cfg


def test_names_and_settings(toy_cfg):
    assert type(get_norm("TOY", 4)) is ToyNorm
    model = build_model(toy_cfg)
    norm = model.backbone.bottom_up.stem.conv1.norm
    assert type(norm) is ToyNorm and norm.factor == 0.5
    configure_norms_by_name(model, {"toy": {"factor": 0.25}})  # a LazyConfig's train.toy
    assert norm.factor == 0.25


def test_solver_and_statistics(toy_cfg):
    toy_cfg.SOLVER.WEIGHT_DECAY_NORM, toy_cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.5, None
    model = build_model(toy_cfg)
    norm = model.backbone.bottom_up.stem.conv1.norm
    kwargs = {"base_lr": 0.1, "weight_decay": 1e-4, "weight_decay_norm": 0.5}
    for groups in (
        build_optimizer(toy_cfg, model).param_groups,
        get_default_optimizer_params(model, **kwargs),  # Detectron2's own
    ):
        decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
        assert decay[norm.weight] == decay[norm.bias] == 0.5
        assert decay[model.backbone.bottom_up.stem.conv1.weight] != 0.5
    hook = LogStatistics(model, 1, ["backbone.bottom_up.stem.conv1.norm"])
    hook.before_train()
    norm(torch.randn(2, 8, 4, 4)).square().sum().backward()
    assert set(hook.moving["backbone.bottom_up.stem.conv1.norm"]) == {"mean", "var", "g", "psi"}
    hook.after_train()


def test_config_check(toy_cfg):
    check_config(toy_cfg)
    toy_cfg.MODEL.TOY.FACTOR = -1.0
    with pytest.raises(ConfigError, match="MODEL.TOY: factor is out of range: -1.0"):
        check_config(toy_cfg)


def test_resume_with_other_settings(toy_cfg):
    text = toy_cfg.dump()
    toy_cfg.MODEL.TOY.FACTOR = 0.25
    assert check_same_run(toy_cfg, text, "the config") == ["MODEL.TOY.FACTOR 0.5 -> 0.25"]


def test_lazy_config(toy, tmp_path):
    arguments = Namespace(
        config_file=str(ROOT / "configs/lazy/scratch_mask_rcnn_R50_FPN_mabn_2x.py"),
        opts=[f"train.output_dir={tmp_path / 'output'}", "+train.toy.factor=-1"],
        num_gpus=0, num_machines=1, resume=False, eval_only=False,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="train.toy: factor is out of range: -1"):
        check(arguments)


def test_classifier_and_benchmark(toy):
    assert "toy" in norm_names()
    model = build_classifier("small", "toy", 2, 8, num_classes=3, factor=0.5)
    assert model[1].factor == 0.5 and type(model[1]) is ToyNorm
    assert layer_norms()["toy"] is ToyNorm and detectron2_norms()["toy"] == "TOY"
    for what in ("layer", "inference", "step"):
        assert "toy" in choose_norms("toy", known_norms(what), "cpu", what)


def test_a_model_without_these_norms_is_left_alone(digits_cfg, caplog):
    for node in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        digits_cfg.MODEL[node].NORM = "BN"
    digits_cfg.MODEL.BACKBONE.NAME = "build_any_norm_resnet_fpn_backbone"
    digits_cfg.SOLVER.IMS_PER_BATCH = 12
    digits_cfg.MODEL.MABN.BATCH_SIZE = 5
    build_model(digits_cfg)
    del digits_cfg["SOLVER"]
    build_model(digits_cfg)
    assert "SIMULATED_BATCH_SIZE" not in caplog.text
    digits_cfg.MODEL.RESNETS.NORM = "MABN"
    digits_cfg.MODEL.MABN.BATCH_SIZE = 0
    with pytest.raises(ValueError, match="BATCH_SIZE is 0.*SOLVER.IMS_PER_BATCH: set BATCH_SIZE"):
        build_model(digits_cfg)
    digits_cfg.MODEL.MABN.BATCH_SIZE = 4
    assert build_model(digits_cfg).backbone.bottom_up.stem.conv1.norm.batch_size == 4


def test_groups_of_group_norm(digits_cfg):
    """All of a model's "GN", and nobody's own GroupNorm; 32 groups, as in Detectron2, by default."""
    for node in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        digits_cfg.MODEL[node].NORM = "GN"
    resnets = digits_cfg.MODEL.RESNETS
    resnets.STEM_OUT_CHANNELS = resnets.RES2_OUT_CHANNELS = digits_cfg.MODEL.FPN.OUT_CHANNELS = 32
    digits_cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = digits_cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32

    def groups(model):
        return {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)}

    assert groups(build_model(digits_cfg)) == {32}
    digits_cfg.MODEL.GN.NUM_GROUPS = 8
    model = build_model(digits_cfg)
    assert groups(model) == {8}
    norm, x = model.backbone.bottom_up.stem.conv1.norm, torch.randn(2, 32, 5, 5)
    torch.testing.assert_close(norm(x), nn.functional.group_norm(x, 8))

    model.own = nn.GroupNorm(4, 16)
    set_num_groups(model, digits_cfg)
    assert model.own.num_groups == 4
    digits_cfg.MODEL.GN.NUM_GROUPS = 3
    with pytest.raises(ValueError, match="MODEL.GN.NUM_GROUPS is 3.* 32 channels of backbone"):
        build_model(digits_cfg)
