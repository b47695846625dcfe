"""From a classifier to a detector, in miniature: the commands of docs/classification.md."""

import os
import subprocess
import sys

import torch
from conftest import ROOT
from detectron2.config import get_cfg

from mabn_d2 import add_mabn_config
from mabn_d2.data.digit_crops import CropParams, make_digit_crops
from mabn_d2.engine import Trainer

NORMALIZED = ["--channel-order", "RGB", "--pixel-mean", "123.675", "116.28", "103.53",
              "--pixel-std", "58.395", "57.12", "57.375"]


def run(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                   "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_classifier_becomes_the_backbone_of_a_detector(small_scenes, tmp_path, caplog):
    data = make_digit_crops(tmp_path / "crops", CropParams(num_train=64, num_val=49))
    run("tools/train_imagenet.py", "--data", data, "--output", tmp_path / "cls", "--arch",
        "resnet18", "--norm", "mabn", "--crop", 32, "--val-resize", 32, "--no-augment",
        "--batch-size", 8, "--epochs", 1, "--epoch-iters", 2, "--lr", 0.02, "--workers", 0,
        "--device", "cpu")
    classifier = tmp_path / "cls/checkpoint.pth"
    run("tools/convert_weights.py", "imagenet", classifier, tmp_path / "R18.pth", *NORMALIZED)

    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/digits/finetune_mask_rcnn_R18_FPN_mabn.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", str(tmp_path / "R18.pth")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("small_scenes_train",), ()
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.MAX_ITER = 0, 2
    cfg.OUTPUT_DIR = str(tmp_path / "det")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    assert "the weights were trained with" not in caplog.text  # the config's input is theirs
    source = torch.load(classifier, weights_only=True)["model"]
    backbone = trainer.model.backbone.bottom_up
    pairs = {
        "conv1.weight": backbone.stem.conv1.weight,
        "bn1.running_var": backbone.stem.conv1.norm.running_var,
        "layer4.1.conv2.weight": backbone.res5[1].conv2.weight,
        "layer3.0.downsample.1.weight": backbone.res4[0].shortcut.norm.weight,
    }
    for name, value in pairs.items():
        assert torch.equal(value, source[name]), name
    before = backbone.stem.conv1.weight.clone()
    trainer.train()
    assert not torch.equal(before, backbone.stem.conv1.weight)
    assert backbone.stem.conv1.norm.iters == 2
