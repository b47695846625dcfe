"""Exported detectors give what the model gives, in a process without Detectron2."""

import importlib.util
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from commands import exit_line
from detectors import narrow_cfg, randomized, scenes
from mabn_d2 import export
from mabn_d2.checkpoint import write_checkpoint
from mabn_d2.checkpoint.description import describe
from mabn_d2.export import ExportableDetector, ExportError, export_checkpoint, export_detector
from mabn_d2.predictor import load_predictor
from paths import ROOT
from repository_configs import narrow


def retinanet_cfg():
    cfg = narrow("retinanet_R50_FPN_mabn_2x.yaml")
    cfg.MODEL.RETINANET.NUM_CLASSES = 10
    cfg.INPUT.MIN_SIZE_TEST, cfg.TEST.DETECTIONS_PER_IMAGE = 128, 20
    return cfg


def faster_cfg():
    cfg = narrow_cfg(DEPTH=18)
    cfg.MODEL.MASK_ON = False
    return cfg


CONFIGS = {
    "mask": lambda: narrow_cfg(DEPTH=18),
    "faster": faster_cfg,
    "retinanet": retinanet_cfg,
}


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    """A checkpoint of a detector with random weights that holds its config."""
    torch.manual_seed(0)
    cfg = CONFIGS[request.param]()
    cfg.DATASETS.TRAIN = ("digit_scenes_train",)  # whose ten classes the checkpoint names
    model = randomized(build_model(cfg))
    if request.param == "retinanet":
        torch.nn.init.constant_(model.head.cls_score.bias, -3)
    path = tmp_path_factory.mktemp(request.param) / "model.pth"
    write_checkpoint({"model": model.state_dict(), **describe(cfg)}, path)
    return path


def run(file, images, folder):
    """Return what the file gives for each image, from a process of its own."""
    np.savez(folder / "images.npz", **{str(i): image.numpy() for i, image in enumerate(images)})
    command = [sys.executable, ROOT / "tests/support/run_exported.py", file]
    command += [folder / "images.npz", folder / "found.npz"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(folder / "found.npz")
    outputs = len(found.files) // len(images)
    return [
        [torch.from_numpy(found[f"{i} {k}"]) for k in range(outputs)] for i in range(len(images))
    ]


@pytest.mark.parametrize("suffix, format", [(".pt", "torchscript"), (".onnx", "onnx")])
def test_ten_scenes_and_another_size(checkpoint, suffix, format, tmp_path):
    file = tmp_path / f"detector{suffix}"
    said = export_checkpoint(checkpoint, format, file, (144, 144))
    assert "the whole detector" in said
    images = [scene["image"].float() for scene in scenes(10)]
    images.append(torch.nn.functional.interpolate(images[0][None], size=(200, 176))[0])
    detector = ExportableDetector(load_predictor(checkpoint, "cpu", 0.05).model)
    objects = 0
    for image, found in zip(images, run(file, images, tmp_path), strict=True):
        with torch.no_grad():
            boxes, classes, scores, *masks = detector(image)
        assert len(found[0]) == len(boxes)
        if not len(boxes):
            continue
        # Of objects with equal scores at the limit of detections, either may be kept.
        clear = scores > scores.min() + 1e-4
        boxes, classes, scores, *masks = (v[clear] for v in (boxes, classes, scores, *masks))
        found = [values[clear] for values in found]
        objects += len(boxes)
        assert torch.equal(found[1], classes)
        torch.testing.assert_close(found[0], boxes, rtol=0, atol=1e-3 * max(image.shape))
        torch.testing.assert_close(found[2], scores, rtol=1e-3, atol=1e-5)
        for mask, wanted in zip(found[3:], masks, strict=True):
            assert mask.dtype == torch.bool and mask.shape == (len(boxes), *image.shape[1:])
            assert (mask != wanted).float().mean() < 1e-3
    assert objects > 50


def test_the_example_of_the_docs_finds_what_the_predictor_finds(checkpoint, tmp_path, monkeypatch):
    """The photo is wider than 4:3 and larger than the size of evaluation."""
    image = scenes(1)[0]["image"][[2, 1, 0]].permute(1, 2, 0).numpy()
    Image.fromarray(image).resize((600, 310)).save(tmp_path / "photo.jpg")
    export_checkpoint(checkpoint, "onnx", tmp_path / "detector.onnx")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/export.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(example, names)
    found = load_predictor(checkpoint, "cpu", 0.05)("photo.jpg")
    assert len(found) == len(names["boxes"]) > 0
    best = found.pred_boxes.tensor[0]
    torch.testing.assert_close(torch.from_numpy(names["boxes"][0]), best, rtol=0, atol=2)
    assert names["classes"][0] == found.pred_classes[0]


@pytest.mark.slow
def test_part_as_exported_program(checkpoint, tmp_path):
    """The selection of boxes depends on data; what is in front of it is written, and it is said."""
    file = tmp_path / "detector.pt2"
    said = export_checkpoint(checkpoint, "exported_program", file, (128, 160))
    assert said.startswith("only backbone, FPN and the head") and "because it stops" in said
    images = [torch.rand(3, 128, 160) * 255]
    (found,) = run(file, images, tmp_path)
    model = load_predictor(checkpoint, "cpu").model
    with torch.no_grad():
        features = model.backbone(model.preprocess_image([{"image": images[0]}]).tensor)
        if hasattr(model, "head"):
            wanted = model.head([features[name] for name in model.head_in_features])
        else:
            rpn = model.proposal_generator
            wanted = rpn.rpn_head([features[name] for name in rpn.in_features])
    for a, b in zip(found, [t for part in wanted for t in part], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_output_and_threshold(checkpoint, tmp_path, monkeypatch):
    """Refused before the model is read; the checkpoint is never written onto."""
    before = checkpoint.read_bytes()
    (tmp_path / "file").touch()
    for output, threshold, message in (
        (checkpoint, 0.5, "is the checkpoint: name another file"),
        (tmp_path, 0.5, "is a folder: name a file"),
        ("", 0.5, "is a folder: name a file"),
        (tmp_path / "file/x.pt", 0.5, "can't be written"),
        (tmp_path / "x.pt", 5, "--threshold is 5.0: use a number from 0 to 1"),
        (tmp_path / "x.pt", "nan", "--threshold is nan"),
    ):
        arguments = ("--format", "torchscript", "--output", output, "--threshold", threshold)
        line = exit_line(monkeypatch, "export_model.py", "--checkpoint", checkpoint, *arguments)
        assert message in line
    # An output of an earlier call, and a checkpoint that is not there.
    arguments = ("--format", "torchscript", "--output", tmp_path / "file")
    line = exit_line(monkeypatch, "export_model.py", "--checkpoint", "no.pth", *arguments)
    assert "can't read no.pth" in line
    assert checkpoint.read_bytes() == before and sorted(tmp_path.iterdir()) == [tmp_path / "file"]


def test_model_of_gray_images(tmp_path):
    cfg = faster_cfg()
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = "L", [128.0], [50.0]
    state = randomized(build_model(cfg)).state_dict()
    write_checkpoint({"model": state, "config": cfg.dump()}, tmp_path / "model.pth")
    export_checkpoint(tmp_path / "model.pth", "torchscript", tmp_path / "x.pt", (64, 64))
    boxes, *_ = torch.jit.load(tmp_path / "x.pt")(torch.rand(1, 64, 96) * 255)
    assert boxes.shape[1] == 4


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else name)
    with pytest.raises(ExportError, match="needs onnx: pip install onnx, or"):
        export_checkpoint(tmp_path / "model.pth", "onnx", tmp_path / "x.onnx")


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize("objects", [1, 3])
def test_every_difference_is_found(wrong, objects):
    """In boxes, classes and scores, of a single object too."""
    outputs = [
        torch.rand(objects, 4) * 50,
        torch.arange(objects),
        torch.linspace(0.9, 0.6, objects),
    ]

    class Detector(torch.nn.Module):
        model = SimpleNamespace(
            roi_heads=SimpleNamespace(box_predictor=SimpleNamespace(test_topk_per_image=100))
        )

        def forward(self, image):
            return outputs

    image = torch.zeros(3, 64, 64)
    export._compare(Detector(), lambda image: outputs, [image])
    different = [values.clone() for values in outputs]
    different[wrong][-1] += 1
    with pytest.raises(ExportError, match=("boxes", "other classes", "scores")[wrong]):
        export._compare(Detector(), lambda image: different, [image])


def test_one_line_errors(tmp_path, monkeypatch):
    cfg = narrow_cfg(DEPTH=18)
    path = tmp_path / "model.pth"
    write_checkpoint({"model": randomized(build_model(cfg)).state_dict()}, path)
    output = tmp_path / "new" / "detector.onnx"
    arguments = ("--checkpoint", path, "--format", "onnx", "--output", output)
    line = exit_line(monkeypatch, "export_model.py", *arguments)
    assert "holds no config" in line and "--config-file" in line
    line = exit_line(monkeypatch, "export_model.py", *arguments, "--images", tmp_path / "*.jpg")
    assert "*.jpg' is no image, no folder with images" in line
    assert not output.parent.exists()
    with pytest.raises(ExportError, match="use Faster R-CNN, Mask R-CNN or RetinaNet"):
        export_detector(torch.nn.Conv2d(3, 3, 1), "onnx", output, [torch.rand(3, 32, 32)])
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    with pytest.raises(ExportError, match="PanopticFPN can't be exported as a whole"):
        ExportableDetector(build_model(cfg))
    assert not output.parent.exists()
