"""From a classifier to a detector: the commands of docs/classification.md, in miniature."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from classifying import ENVIRONMENT
from paths import ROOT

# What is added to each command, by its tool; nothing else is changed.
MINIATURE = {
    "mabn_d2.classification.digit_crops": "--num-train 64 --num-val 49",
    "tools/train_imagenet.py": "--epochs 1 --epoch-iters 2 --batch-size 8 --crop 32 --val-resize 32 "
    "--workers 0 --device cpu",
    "tools/convert_weights.py": "",
    "tools/train_net.py": "SOLVER.MAX_ITER 2 DATALOADER.NUM_WORKERS 0 INPUT.MIN_SIZE_TEST 64 "
    "TEST.DETECTIONS_PER_IMAGE 5",
}


def documented_commands():
    text = (ROOT / "docs/classification.md").read_text()
    section = text.split("## From a classifier to a detector")[1].split("\n## ")[0]
    block = "\n".join(line for line in section.splitlines() if line.startswith("    "))
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_documented_commands_lead_from_classifier_to_detectors(tmp_path):
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of `python`
    commands, said = documented_commands(), []
    tools = [next(part for part in command if part in MINIATURE) for command in commands]
    assert tools == [*MINIATURE, "tools/train_net.py"]
    for command, tool in zip(commands, tools, strict=True):
        done = subprocess.run(
            [*command, *MINIATURE[tool].split()],
            cwd=tmp_path,
            text=True,
            env={**ENVIRONMENT, "PATH": path},
            capture_output=True,
        )
        assert done.returncode == 0, (command, done.stderr[-3000:])
        said.append(done.stdout + done.stderr)
    assert "the weights were trained with" not in said[3]  # the config's input is theirs

    output = tmp_path / "output/digits"
    source = torch.load(output / "R18/checkpoint.pth", weights_only=True)["model"]
    close = []
    for name in ("finetune_mask_rcnn_R18_FPN_mabn", "R18-scratch"):
        model = torch.load(output / name / "model_final.pth", weights_only=False)["model"]
        assert model["backbone.bottom_up.stem.conv1.norm.iters"] == 2
        pairs = {
            "conv1.weight": "stem.conv1.weight",
            "layer4.1.conv2.weight": "res5.1.conv2.weight",
        }
        close += [  # two iterations at the beginning of the warm-up move little
            torch.allclose(model[f"backbone.bottom_up.{new}"], source[old], atol=1e-3)
            for old, new in pairs.items()
        ]
        records = [json.loads(line) for line in (output / name / "metrics.json").open()]
        assert {"bbox/AP", "segm/AP"} <= records[-1].keys()
    assert close == [True, True, False, False]
