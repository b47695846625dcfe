"""checkpoint/imagenet.py, against classifiers written independently in plain torch."""

import json

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_backbone
from torch import nn

from converted import PREFIX, assert_same_features, cfg_of
from mabn_d2 import CheckpointError, SafeCheckpointer, convert_imagenet
from mabn_d2.checkpoint import warn_of_differences, write_checkpoint
from paths import ROOT
from published_resnet import Mabn, PublishedResNet, add_windows

FORMS = {
    "bare": lambda state: state,
    "wrapped": lambda state: {
        "model": state,
        "iteration": 600000,
        "optimizer": {},
        "scheduler": {},
    },
    "module": lambda state: {f"module.{name}": value for name, value in state.items()},
    "wrapped module": lambda state: FORMS["wrapped"](FORMS["module"](state)),
    "(1, C, 1, 1)": lambda state: {
        k: v.reshape(1, -1, 1, 1) if "running_var" in k else v for k, v in state.items()
    },
    "classification windows": lambda state: add_windows(state, "classification"),
    "detection windows": lambda state: add_windows(state, "detection"),
    "no fc": lambda state: {k: v for k, v in state.items() if not k.startswith("fc.")},
    "arrays": lambda state: {k: v.numpy() for k, v in state.items()},
}


@pytest.mark.parametrize("stride_in_1x1", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, stride_in_1x1):
    source = PublishedResNet(50, width=8, stride_in_1x1=stride_in_1x1)
    state = {name: value.detach() for name, value in source.state_dict().items()}
    checkpoint = convert_imagenet(FORMS[form](state), stride_in_1x1)
    assert_same_features(source, checkpoint)
    assert all(name.startswith(PREFIX) for name in checkpoint["model"])
    assert checkpoint["mabn_d2"]["config"]["MODEL.RESNETS.STRIDE_IN_1X1"] is stride_in_1x1
    if not stride_in_1x1:  # the default
        assert convert_imagenet(FORMS[form](state))["mabn_d2"] == checkpoint["mabn_d2"]


@pytest.mark.parametrize("norm", [Mabn, nn.BatchNorm2d])
@pytest.mark.parametrize("bgr255, order, mean", [(True, "BGR", 0.0), (False, "RGB", 123.675)])
def test_input_of_this_package_s_classifiers(norm, bgr255, order, mean):
    """Their checkpoints say what input they were trained with, whatever the norm."""
    state = PublishedResNet(18, width=8, norm=norm).state_dict()
    config = convert_imagenet({"model": state, "args": {"bgr255": bgr255}})["mabn_d2"]["config"]
    assert config["INPUT.FORMAT"] == order and config["MODEL.PIXEL_MEAN"][0] == mean


def test_eps_of_this_package_s_classifiers(caplog):
    source = PublishedResNet(18, width=8)
    for norm in (m for m in source.modules() if isinstance(m, Mabn)):
        norm.running_var.fill_(1e-3)
        norm.eps = 1e-3
    args = {"bgr255": True, "norm_option": ["eps=0.001", "clip_start=7"]}
    checkpoint = convert_imagenet({"model": source.state_dict(), "args": args})
    assert_same_features(source, checkpoint)
    cfg = cfg_of(checkpoint)
    cfg.MODEL.MABN.EPS = 1e-5
    warn_of_differences(checkpoint["mabn_d2"], cfg)
    assert "MODEL.MABN.EPS is 1e-05, the weights were trained with 0.001" in caplog.text
    for options, error in ((["activation='relu'"], "has an activation"), ([3], "norm-option .3.")):
        args["norm_option"] = options
        with pytest.raises(CheckpointError, match=error):
            convert_imagenet({"model": source.state_dict(), "args": args})


def test_wrong_stride_loads_in_silence():
    source = PublishedResNet(50, width=8, stride_in_1x1=True)
    with pytest.raises(AssertionError, match="res3"):
        assert_same_features(source, convert_imagenet(source.state_dict(), False))


@pytest.mark.parametrize(
    "arguments",
    [
        {"depth": 18, "width": 8},
        {"depth": 34, "width": 8},
        {"depth": 101, "width": 8},
        {"depth": 152, "width": 8},
        {"depth": 50, "width": 16, "groups": 8, "width_per_group": 8},
    ],
    ids=str,
)
def test_architectures(arguments):
    source = PublishedResNet(**arguments)
    checkpoint = convert_imagenet(source.state_dict())
    assert_same_features(source, checkpoint)
    config = checkpoint["mabn_d2"]["config"]
    assert config["MODEL.RESNETS.DEPTH"] == arguments["depth"]
    assert config.get("MODEL.RESNETS.NUM_GROUPS", 1) == arguments.get("groups", 1)


@pytest.mark.slow
@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_full_width(stride_in_1x1):
    source = PublishedResNet(50, stride_in_1x1=stride_in_1x1)
    state = add_windows(source.state_dict(), "classification")
    golden = json.loads((ROOT / "tests/golden/r50_classification_keys.json").read_text())
    shapes = {name: list(value.shape) for name, value in state.items()}
    assert {k: v or [1] for k, v in shapes.items()} == golden
    assert_same_features(source, convert_imagenet({"model": state}, stride_in_1x1), size=224)


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
@pytest.mark.parametrize("checkpointer", [DetectionCheckpointer, SafeCheckpointer])
def test_loads_into_detectron2(suffix, checkpointer, tmp_path):
    source = PublishedResNet(50, width=8)
    checkpoint = convert_imagenet(add_windows(source.state_dict(), "classification"))
    path = str(tmp_path / f"weights.{suffix}")
    write_checkpoint(checkpoint, path)
    cfg = cfg_of(checkpoint)
    cfg.MODEL.BACKBONE.NAME = "build_mabn_resnet_fpn_backbone"
    model = nn.Module()
    model.backbone = build_backbone(cfg)
    x = torch.randn(2, 3, 64, 64)
    for _ in range(40):  # the windows are full, and must not be read as if they still were
        model.backbone.bottom_up.stem.conv1(x)
    loader = checkpointer(model)
    logged = []
    loader._log_incompatible_keys = logged.append
    loader.load(path)
    (incompatible,) = logged
    assert not incompatible.unexpected_keys and not incompatible.incorrect_shapes
    assert [k for k in incompatible.missing_keys if "bottom_up" in k] == []
    norm = model.backbone.bottom_up.stem.conv1.norm
    assert norm.iters == 0 and not norm.buffer_x2.any()
    assert torch.equal(norm.running_var, source.bn1.running_var)
    y = model.backbone.bottom_up.stem.conv1(x)
    normalized = (y - norm.bias[:, None, None]) / norm.weight[:, None, None]
    assert torch.allclose(normalized.square().mean((0, 2, 3)), torch.ones(8), rtol=1e-3)


def test_keep_buffers(tmp_path):
    state = PublishedResNet(18, width=8).state_dict()
    checkpoint = convert_imagenet(add_windows(state, "detection", batches=4), keep_buffers=True)
    stem = f"{PREFIX}stem.conv1.norm."
    assert checkpoint["model"][f"{stem}buffer_x2"].shape == (4, 8)
    assert checkpoint["model"][f"{stem}iters"].dtype == torch.int64
    with pytest.raises(CheckpointError, match="no .*buffer_gz.* to keep"):
        convert_imagenet(add_windows(state, "classification"), keep_buffers=True)


def test_every_entry_is_accounted_for():
    state = add_windows(PublishedResNet(18, width=8).state_dict(), "classification")
    checkpoint = convert_imagenet({"model": state, "iteration": 3})
    dropped = checkpoint["mabn_d2"]["dropped"]
    assert len(checkpoint["model"]) + sum(map(len, dropped.values())) == len(state) + 1
    for change, message in (
        ({"layer1.0.attention.weight": torch.ones(3)}, "layer1.0.attention.weight"),
        ({"bn1.weight": None}, "1 missing: stem.conv1.norm.weight"),
        ({"layer5.0.conv1.weight": torch.ones(8, 8, 3, 3)}, "layer5.0.conv1.weight"),
        ({"layer1.0.conv2.weight": torch.ones(8, 8, 1, 1)}, r"res2.0.conv2.weight .*8, 8, 1, 1"),
        ({"bn1.bias": torch.full((8,), torch.nan)}, "stem.conv1.norm.bias"),
        ({"bn1.running_var": -torch.ones(8)}, "stem.conv1.norm.running_var"),
        ({"bn1.weight": torch.ones(8, dtype=torch.int64)}, "stem.conv1.norm.weight"),
        ({"bn1.weight": "x"}, r"bn1.weight \(str\)"),
        ({"bn1.weight": torch.ones(1).expand(8)}, "bn1.weight"),
        ({"stem.bn1.weight": torch.ones(8)}, "bn1.weight and stem.bn1.weight"),
        ({"layer4.1.conv1.weight": None, "layer4.1.bn1.weight": None}, "2 missing"),
    ):
        changed = {k: v for k, v in (state | change).items() if v is not None}
        with pytest.raises(CheckpointError, match=message):
            convert_imagenet(changed)
