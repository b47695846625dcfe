"""The model and the weights of a run are checked before anything is trained or written."""

import re

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from commands import CONFIG, SMALL, exit_line
from mabn_d2 import CheckpointError, convert_imagenet
from mabn_d2.checkpoint import write_checkpoint
from mabn_d2.engine import ConfigError, Trainer, check_config, read_config
from mabn_d2.engine.model_check import check_model
from mabn_d2.engine.schedule import finalize_schedule
from mabn_d2.layers import MABN2d
from paths import ROOT
from published_resnet import PublishedResNet

NORMS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The commands' small model with MABN and with BatchNorm: {norm: file}."""
    torch.manual_seed(0)  # whatever test comes first
    files = {}
    for norm in ("MABN", "BN"):
        opts = [part for node in NORMS for part in (f"MODEL.{node}.NORM", norm)]
        opts += ["MODEL.BACKBONE.NAME", "build_any_norm_resnet_fpn_backbone", "MODEL.DEVICE", "cpu"]
        model = build_model(read_config(str(ROOT / CONFIG), [*map(str, SMALL), *opts]))
        files[norm] = tmp_path_factory.mktemp("weights") / f"{norm}.pth"
        write_checkpoint({"model": model.state_dict()}, files[norm])
    return files


@pytest.mark.parametrize("tool", ["train_net.py", "demo.py"])
def test_weights_of_another_norm_end_the_command(tool, weights, tmp_path, monkeypatch):
    output = tmp_path / "output"
    line = exit_line(
        monkeypatch, tool, "--config-file", CONFIG, "--num-gpus", 0, *SMALL,
        "OUTPUT_DIR", output, "MODEL.WEIGHTS", weights["BN"],
    )  # fmt: skip
    assert "MODEL.WEIGHTS" in line and "BatchNorm where the model has MABN" in line
    assert not output.exists()


def test_weights_of_another_norm_end_a_script_of_ones_own(digits_cfg, weights):
    digits_cfg.merge_from_list([*SMALL, "MODEL.WEIGHTS", str(weights["BN"])])
    with pytest.raises(CheckpointError, match="BatchNorm where the model has MABN"):
        Trainer(digits_cfg).resume_or_load(resume=False)


def test_weights_with_names_that_are_matched(digits_cfg, weights):
    """Detectron2's `?matching_heuristics=True` behind the name of a local file."""
    digits_cfg.merge_from_list(
        [*SMALL, "MODEL.WEIGHTS_IF_PRESENT", f"{weights['MABN']}?matching_heuristics=True"]
    )
    finalize_schedule(digits_cfg)
    assert digits_cfg.MODEL.WEIGHTS.endswith("matching_heuristics=True")
    check_config(digits_cfg)
    check_model(digits_cfg, train=False)
    digits_cfg.MODEL.WEIGHTS += "&other=1"
    with pytest.raises(CheckpointError, match="behind .* only matching_heuristics=True"):
        check_model(digits_cfg, train=False)
    digits_cfg.MODEL.WEIGHTS = "no.pth?matching_heuristics=True"
    with pytest.raises(ConfigError, match="no.pth.matching_heuristics=True', which does not exist"):
        check_config(digits_cfg)


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "MODEL.WEIGHTS is '', but --eval-only needs weights"),
        (["MODEL.WEIGHTS", "BN"], "BatchNorm where the model has MABN"),
        (["MODEL.WEIGHTS", "MABN", "MODEL.ROI_HEADS.NUM_CLASSES", 9], "an evaluation .* need all"),
        (["MODEL.WEIGHTS", "MABN", "MODEL.RESNETS.DEPTH", 18], "an evaluation .* need all"),
    ],
)
def test_evaluation_needs_all_weights(options, message, weights, tmp_path, monkeypatch):
    options = [weights.get(o, o) for o in options]
    line = exit_line(
        monkeypatch, "train_net.py", "--config-file", CONFIG, "--num-gpus", 0, "--eval-only", *SMALL,
        "OUTPUT_DIR", tmp_path / "output", *options,
    )  # fmt: skip
    assert re.search(message, line) and not (tmp_path / "output").exists()


def test_conversion_while_loading(digits_cfg, weights, caplog):
    """MODEL.MABN.CONVERT_WEIGHTS: running_var belongs to the centred filters, frozen ones too."""
    digits_cfg.merge_from_list(
        [*SMALL, "MODEL.WEIGHTS", str(weights["BN"]), "MODEL.MABN.CONVERT_WEIGHTS", True,
         "MODEL.BACKBONE.FREEZE_AT", 1, "SOLVER.MAX_ITER", 1]
    )  # fmt: skip
    digits_cfg.DATASETS.TEST = ()
    trainer = Trainer(digits_cfg)
    trainer.resume_or_load(resume=False)
    assert "BECOME MABN" in caplog.text and "recalibrating the 24 MABN layers" in caplog.text
    stem = trainer.model.backbone.bottom_up.stem.conv1
    assert not stem.norm.weight.requires_grad and not stem.norm.running_var.eq(1).any()
    images = trainer.model.preprocess_image(next(iter(trainer.data_loader))).tensor
    with torch.no_grad():
        x2 = torch.nn.functional.conv2d(
            images, stem.weight - stem.weight.mean((1, 2, 3), keepdim=True), None,
            stem.stride, stem.padding,
        ).square().mean((0, 2, 3))  # fmt: skip
    torch.testing.assert_close(stem.norm.running_var, x2, rtol=0.7, atol=0)  # of other images
    norms = [m for m in trainer.model.modules() if isinstance(m, MABN2d)]
    assert all(norm.iters == 0 for norm in norms)
    trainer.train()


@pytest.mark.parametrize("centred", [False, True])
def test_converted_file_is_recalibrated_before_training(digits_cfg, tmp_path, caplog, centred):
    """What convert_weights.py makes of a BatchNorm classifier; exact where filters were centred."""
    classifier = PublishedResNet(18, width=64, conv=nn.Conv2d, norm=nn.BatchNorm2d)
    if centred:
        for module in classifier.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data -= module.weight.mean((1, 2, 3), keepdim=True)
    converted = convert_imagenet(classifier.state_dict())
    write_checkpoint(converted, tmp_path / "R18.pth")
    digits_cfg.merge_from_list(
        [*SMALL, "MODEL.WEIGHTS", str(tmp_path / "R18.pth"), "MODEL.RESNETS.DEPTH", 18,
         "MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    )  # fmt: skip
    digits_cfg.DATASETS.TEST, digits_cfg.SOLVER.MAX_ITER = (), 1
    trainer = Trainer(digits_cfg)
    trainer.resume_or_load(resume=False)
    assert ("recalibrating" in caplog.text) == (not centred)
    norm = trainer.model.backbone.bottom_up.stem.conv1.norm
    of_classifier = converted["model"]["backbone.bottom_up.stem.conv1.norm.running_var"]
    assert torch.equal(norm.running_var, of_classifier) == centred
    if not centred:
        trainer.train()  # a resumed run keeps its own
        caplog.clear()
        digits_cfg.SOLVER.MAX_ITER = 2
        Trainer(digits_cfg).resume_or_load(resume=True)
        assert "recalibrating" not in caplog.text
