"""Weights that do not belong to a model are refused by one line; those that do are loaded."""

import logging
import pickle

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from mabn_d2 import CheckpointError, SafeCheckpointer, fold_mabn
from mabn_d2.checkpoint import write_checkpoint
from mabn_d2.layers import MABN2d

NODES = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
STEM = "backbone.bottom_up.stem.conv1.norm"


def detector(cfg, norm):
    """A small Mask R-CNN with a norm and statistics that differ from the initial ones."""
    cfg = cfg.clone()
    cfg.MODEL.BACKBONE.NAME = "build_any_norm_resnet_fpn_backbone"
    for node in NODES:
        cfg.MODEL[node].NORM = norm
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 32  # for GN
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
    model = build_model(cfg)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_var", "running_mean")):
            buffer.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize(
    "theirs, ours, message",
    [
        ("BN", "MABN", r"BatchNorm where the model has MABN \(24 norms.*convert_weights.py"),
        ("FrozenBN", "MABN", "BatchNorm where the model has MABN.*CONVERT_WEIGHTS"),
        ("BRN", "MABN", "BatchNorm where the model has MABN"),
        ("GN", "MABN", "norms without statistics where the model has MABN"),
        ("MABN", "BN", "MABN where the model has .*BatchNorm.*convert_weights.py fold"),
        ("MABN", "FrozenBN", "MABN where the model has FrozenBatchNorm2d"),
        ("MABN", "BRN", "MABN where the model has BatchRenorm2d"),
        ("MABN", "GN", 'MABN where the model has GroupNorm.*NORM to "MABN"'),
        ("BN", "GN", "BatchNorm where the model has GroupNorm"),
        ("MABN", "", r'MABN where the model has no norm \(24 norms, the first backbone.*to "MABN"'),
        ("BN", "", r"norms where the model has no norm \(24 norms.*MODEL.RESNETS.NORM"),
        ("GN", "", "norms where the model has no norm"),
    ],
)
def test_another_norm_is_refused(digits_cfg, tmp_path, theirs, ours, message):
    path = str(tmp_path / "a.pth")
    write_checkpoint({"model": detector(digits_cfg, theirs).state_dict()}, path)
    model = detector(digits_cfg, ours)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as error:
        SafeCheckpointer(model).load(path)
    assert "\n" not in str(error.value) and path in str(error.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("ours", ["BN", "FrozenBN", "BRN"])
def test_batch_norms_take_each_other(digits_cfg, tmp_path, ours):
    source = detector(digits_cfg, "BN")
    write_checkpoint({"model": source.state_dict()}, tmp_path / "a.pth")
    model = detector(digits_cfg, ours)
    SafeCheckpointer(model, complete=True).load(str(tmp_path / "a.pth"))
    for name, value in model.state_dict().items():
        if name in source.state_dict():
            assert torch.equal(value, source.state_dict()[name])


def test_a_folded_mabn_loads_into_mabn(digits_cfg, tmp_path):
    source = detector(digits_cfg, "MABN")
    write_checkpoint({"model": fold_mabn(source).state_dict()}, tmp_path / "a.pth")
    model = detector(digits_cfg, "MABN")
    SafeCheckpointer(model, complete=True).load(str(tmp_path / "a.pth"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = (m.eval().backbone(images) for m in (source, model))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def caffe2(state):
    """A ResNet whose BatchNorms are merged into scale and bias, as MSRA's R-50.pkl has them."""
    blobs = {}
    for name, value in state.items():
        if not name.startswith("backbone.bottom_up.") or "running" in name or "tracked" in name:
            continue
        name = name.removeprefix("backbone.bottom_up.").replace("stem.conv1", "conv1")
        name = name.replace(".norm.weight", "_bn_s").replace(".norm.bias", "_bn_b")
        name = name.replace(".weight", "_w").replace(".", "_").replace("shortcut", "branch1")
        name = name.replace("_conv1", "_branch2a").replace("_conv2", "_branch2b")
        blobs[name.replace("conv1_bn", "res_conv1_bn")] = value.numpy()
    return {"blobs": blobs}


@pytest.mark.parametrize("kind", ["Caffe2", "torchvision"])
def test_model_zoo_files_with_names_that_are_matched(digits_cfg, tmp_path, kind):
    """The files of detectron2://ImageNetPretrained, whose names lack the model's prefix."""
    state = detector(digits_cfg, "BN").state_dict()
    if kind == "Caffe2":
        data, message = caffe2(state), "norms without statistics where the model has MABN"
    else:
        prefix = "backbone.bottom_up."
        arrays = {k.removeprefix(prefix): v.numpy() for k, v in state.items() if prefix in k}
        data = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
        message = rf"BatchNorm where the model has MABN \(12 norms, the first {STEM}\)"
    path = tmp_path / "R.pkl"
    path.write_bytes(pickle.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        SafeCheckpointer(detector(digits_cfg, "MABN")).load(str(path))
    with pytest.raises(CheckpointError, match="norms where the model has no norm"):
        SafeCheckpointer(detector(digits_cfg, "")).load(str(path))
    model = detector(digits_cfg, "FrozenBN")
    SafeCheckpointer(model).load(str(path))
    assert torch.equal(model.state_dict()[f"{STEM}.weight"], state[f"{STEM}.weight"])
    if kind == "torchvision":
        model = detector(digits_cfg, "MABN")
        checkpointer = SafeCheckpointer(model, convert_batch_norm=True)
        checkpointer.load(str(path))
        assert len(checkpointer.converted) == 12


def test_converted_weights(digits_cfg, tmp_path, caplog):
    """Centred filters, means folded: the same function, where the source's filters were centred."""
    source = detector(digits_cfg, "BN")
    for module in source.modules():
        if isinstance(module, nn.Conv2d) and getattr(module, "norm", None):
            module.weight.data -= module.weight.data.mean((1, 2, 3), keepdim=True)
    path = str(tmp_path / "a.pth")
    write_checkpoint({"model": source.state_dict()}, path)
    model = detector(digits_cfg, "MABN")
    checkpointer = SafeCheckpointer(model, convert_batch_norm=True)
    checkpointer.load(path)
    assert len(checkpointer.converted) == 24 and "BECOME MABN" in caplog.text
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = (m.eval().backbone(images) for m in (source, model))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    with pytest.raises(CheckpointError, match="an evaluation needs weights"):
        SafeCheckpointer(model, convert_batch_norm=True, complete=True).load(path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_numbers_that_no_training_leaves(tmp_path, value):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), MABN2d(4))
    state = model.state_dict()
    state["1.running_var"] = torch.tensor([1.0, 1.0, value, 1.0])
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="NaN, infinite, or negative.*1.running_var"):
        SafeCheckpointer(model).load(str(tmp_path / "a.pth"))
    assert model[1].running_var.eq(1).all()


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    lambda s: {"model": s, "iteration": np.int64(3)},
    lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"model_ema": s},
    lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    lambda s: {"model": {k: v.numpy() for k, v in s.items()}, "best": np.float64(0.5)},
    lambda s: {"model": s, "model_ema": {k: 0 * v for k, v in s.items()}},
])  # fmt: skip
@pytest.mark.parametrize("zip_file", [True, False])
def test_what_training_programs_write(tmp_path, wrap, zip_file):
    source, model = (nn.Sequential(nn.Conv2d(3, 4, 3), MABN2d(4)) for _ in range(2))
    source[1].running_var.uniform_(0.5, 2)
    data = wrap(source.state_dict())
    torch.save(data, tmp_path / "a.pth", _use_new_zipfile_serialization=zip_file)
    SafeCheckpointer(model, complete=True).load(str(tmp_path / "a.pth"))
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_counts_and_what_is_missing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = nn.ModuleDict({"backbone": nn.Conv2d(3, 4, 3), "head": nn.Linear(4, 3)})
    path = str(tmp_path / "a.pth")
    torch.save({"model": source.state_dict()}, path)
    model = nn.ModuleDict({"backbone": nn.Conv2d(3, 4, 3), "head": nn.Linear(4, 5)})
    model["mask"] = nn.Linear(1, 1)
    SafeCheckpointer(model).load(path)
    (line,) = [r.getMessage() for r in caplog.records if "entries are loaded" in r.getMessage()]
    assert "2 of the model's 6 entries are loaded" in line
    assert (
        "start anew: mask (2), head (2)" in line and "head.weight (3, 4) instead of (5, 4)" in line
    )
    with pytest.raises(CheckpointError, match="2 of the model's 6.*an evaluation .* need all"):
        SafeCheckpointer(model, complete=True).load(path)
    with pytest.raises(CheckpointError, match="no weights to evaluate"):
        SafeCheckpointer(model, complete=True).load("")
    with pytest.raises(CheckpointError, match=r"none of its 4 entries \(backbone.bias"):
        SafeCheckpointer(nn.ModuleDict({"other": nn.Linear(1, 1)})).load(path)
    with pytest.raises(CheckpointError, match="can't read .*b.pth"):
        SafeCheckpointer(model).load(str(tmp_path / "b.pth"))


def test_a_resumed_run_needs_all_of_its_checkpoint(tmp_path):
    SafeCheckpointer(nn.Linear(2, 2), str(tmp_path)).save("model_0")
    model = nn.Module()
    model.a, model.weight = nn.Linear(1, 1), nn.Parameter(torch.ones(2, 2))
    with pytest.raises(CheckpointError, match="1 of the model's 3.*resumed run need all"):
        SafeCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
