"""From a labelling tool's export to pictures by the two commands, as a user runs them."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pycocotools.coco import COCO

from commands import SMALL_CONFIG, run
from exports import LAYOUTS, MASKS, NAMES, write_export
from mabn_d2 import load_predictor
from mabn_d2.checkpoint import read_checkpoint
from mabn_d2.layers import CenConv2d, MABN2d
from paths import ROOT


def options(tmp_path, folder, *arguments, gpus=0):
    """Return the arguments of train_net.py."""
    file = tmp_path / "config.yaml"
    file.write_text(SMALL_CONFIG)
    return [
        "--config-file", file, "--data", folder, "--num-gpus", gpus, "--dist-url", "auto",
        *arguments, "OUTPUT_DIR", tmp_path / "output",
    ]  # fmt: skip


def run_here(monkeypatch, tool, *arguments):
    """Run a tool in this process, which saves the seconds that its imports take."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")


def run_there(monkeypatch, tool, *arguments):
    """Run a tool as a user does; return what it says."""
    done = run(tool, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def results(output):
    (file,) = Path(output).rglob("coco_instances_results.json")
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    "layout, masks, run_tool",
    [
        ("roboflow", "polygons", run_here),
        ("coco", "rle", run_here),
        ("cvat", "polygons", run_here),
        ("label_studio", "boxes", run_here),
        ("json", "rle", run_here),
        *(
            pytest.param(layout, masks, run_there, marks=pytest.mark.slow)
            for layout in LAYOUTS
            for masks in MASKS
        ),
    ],
)
def test_from_export_to_pictures(tmp_path, layout, masks, run_tool, monkeypatch):
    """Trains, evaluates, predicts folded; the run's config.yaml evaluates to the same again."""
    folder = write_export(tmp_path / "Mein Export", layout, masks, (6, 2))
    text = run_tool(monkeypatch, "train_net.py", *options(tmp_path, folder))
    if text:
        assert "Own images" in text and "fünf" in text and "Evaluation results for bbox" in text
        assert ("Evaluation results for segm" in text) == (masks != "boxes")
    output = tmp_path / "output"
    weights = output / "model_final.pth"
    cfg = yaml.safe_load((output / "config.yaml").read_text())
    assert cfg["MODEL"]["MASK_ON"] == (masks != "boxes")

    again = ["--config-file", output / "config.yaml", "--num-gpus", 0, "--eval-only"]
    again += ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", tmp_path / "again"]
    run_tool(monkeypatch, "train_net.py", *again)
    assert results(tmp_path / "again") == results(output)

    run_tool(
        monkeypatch, "predict.py", "--checkpoint", weights, folder,
        "--output", tmp_path / "predictions", "--threshold", 0.001,
    )  # fmt: skip
    coco = COCO(str(tmp_path / "predictions/images.json"))
    assert len(coco.imgs) == 8 and [c["name"] for c in coco.cats.values()] == NAMES
    found = coco.loadRes(str(tmp_path / "predictions/predictions.json"))
    assert found.anns
    for image in coco.imgs.values():
        assert (tmp_path / "predictions" / image["picture"]).is_file()
    model = load_predictor(weights, "cpu").model
    assert not any(isinstance(m, (MABN2d, CenConv2d)) for m in model.modules())


def torchrun(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "tools/train_net.py", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def test_two_processes_are_one_run(tmp_path):
    """By --num-gpus 2 and by torchrun: the same weights, one table, one set of results."""
    folder = write_export(tmp_path / "export", "cvat", "rle", (6, 2))
    texts, weights = [], []
    for name in ("spawned", "torchrun"):
        (tmp_path / name).mkdir()
        if name == "spawned":
            arguments = options(tmp_path / name, folder, gpus=2)
            texts.append(run_there(None, "train_net.py", *arguments))
        else:
            done = torchrun(
                "--config-file", tmp_path / "spawned/config.yaml", "--data", folder,
                "OUTPUT_DIR", tmp_path / name / "output",
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            texts.append(done.stdout + done.stderr)
        output = tmp_path / name / "output"
        weights.append(read_checkpoint(output / "model_final.pth")["model"])
        assert len(re.findall("Own images", texts[-1])) == 1
        assert yaml.safe_load((output / "config.yaml").read_text())["DATASETS"]["FOLDER"] == str(
            folder
        )
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
