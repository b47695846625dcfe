"""tools/predict.py: pictures, COCO results, and nothing outside of the output folder."""

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from PIL import Image, ImageOps, features
from pycocotools.coco import COCO

from detectors import assert_same_instances, narrow_cfg, randomized, scenes
from mabn_d2 import SafeCheckpointer, load_predictor
from mabn_d2.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from mabn_d2.commands.predict import main
from mabn_d2.data.mapper import BadImageError
from mabn_d2.engine.predict_files import find_images
from mabn_d2.layers import CenConv2d, MABN2d
from mabn_d2.modeling.norm import build_model
from mabn_d2.predictor import Predictor
from paths import ROOT

# Names that would be paths, mathematics, control characters, or have no glyph.
NAMES = [
    "../../up",
    "/root/x",
    "$x_{",
    "a$b$",
    "\x1b[31mred",
    "two\nlines",
    "",
    "猫",
    "é" * 99,
    "%s",
]
CLASSES = [{"id": 3 * i + 2, "name": name} for i, name in enumerate(NAMES)]


def config():
    cfg = narrow_cfg()
    cfg.INPUT.MIN_SIZE_TEST = 144  # of the scenes, which are not resized then
    return cfg


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomized(build_model(config()))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("model")
    checkpointer = SafeCheckpointer(model, str(folder))
    checkpointer.description = {"config": config().dump(), "classes": CLASSES}
    checkpointer.save("model")
    return folder / "model.pth"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two scenes in either of two folders, equal names; not to be changed."""
    root = tmp_path_factory.mktemp("photos")
    for folder, i in (("a", 0), ("b/deep er", 1)):
        (root / folder).mkdir(parents=True)
        image = scenes()[i]["image"].permute(1, 2, 0).numpy()[:, :, ::-1]
        Image.fromarray(np.ascontiguousarray(image)).save(root / folder / "photo.png")
    return root


def predict(checkpoint, output, *arguments):
    """Run the command in this process; return its output, results, and image list."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(
            ["--checkpoint", str(checkpoint), "--output", str(output), "--device", "cpu",
             *map(str, arguments)]
        )  # fmt: skip
    read = lambda name: json.loads((Path(output) / name).read_text())  # noqa: E731
    return out.getvalue(), read("predictions.json"), read("images.json")


def files_in(folder):
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}


def test_pictures_results_and_table(checkpoint, photos, tmp_path, model):
    text, results, images = predict(checkpoint, tmp_path / "out", photos, "--threshold", 0.1)
    assert files_in(tmp_path) == {
        "out/predictions.json", "out/images.json", "out/pictures/photo.jpg", "out/pictures/photo-2.jpg"
    }  # fmt: skip
    assert [i["picture"] for i in images["images"]] == [
        "pictures/photo.jpg",
        "pictures/photo-2.jpg",
    ]
    assert [i["file_name"] for i in images["images"]] == [
        str(photos / "a/photo.png"), str(photos / "b/deep er/photo.png")
    ]  # fmt: skip
    assert images["categories"] == CLASSES and "\x1b" not in text and "2 images" in text
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "out/images.json"))
        loaded = coco.loadRes(str(tmp_path / "out/predictions.json"))
    assert len(loaded.anns) == len(results) > 5
    # As the model that was trained says.
    with torch.no_grad():
        instances = model.eval()(scenes())[0]["instances"]
    instances = instances[instances.scores >= 0.1]
    first = [r for r in results if r["image_id"] == 1]
    assert len(first) == len(instances)
    for result, score, index, box in zip(
        first, instances.scores, instances.pred_classes, instances.pred_boxes.tensor, strict=True
    ):
        assert result["score"] == pytest.approx(score.item(), rel=1e-4)
        assert result["category_id"] == CLASSES[index]["id"]
        x, y, width, height = result["bbox"]
        np.testing.assert_allclose([x, y, x + width, y + height], box, atol=1e-2)
    for image in images["images"]:
        with Image.open(tmp_path / "out" / image["picture"]) as picture:
            assert max(picture.size) == 480


def test_folded_predictions_are_the_same(checkpoint):
    folded, plain = (load_predictor(checkpoint, "cpu", 0.0, fold=f) for f in (True, False))
    assert not any(isinstance(m, (MABN2d, CenConv2d)) for m in folded.model.modules())
    images = [scene["image"].permute(1, 2, 0).numpy() for scene in scenes()]
    found = [[{"instances": p(image)} for image in images] for p in (plain, folded)]
    assert_same_instances(*found, rtol=1e-3)


def test_what_an_image_is(checkpoint, photos, tmp_path):
    """Path, array and PIL image agree; EXIF turns as in the training; names come with it."""
    predictor = load_predictor(str(checkpoint), device="cpu", threshold=0.1)
    path = photos / "a/photo.png"
    found = predictor(path)
    assert list(found.class_names) == [NAMES[k] for k in found.pred_classes]
    assert found.scores.min() >= 0.1 and list(found.scores) == sorted(found.scores, reverse=True)
    image = Image.open(path)
    for same in (str(path), image, np.asarray(image)[:, :, ::-1]):
        assert torch.equal(predictor(same).pred_boxes.tensor, found.pred_boxes.tensor)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    turned.save(tmp_path / "turned.png", exif=exif)
    assert ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")).size == image.size
    for same in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert torch.equal(predictor(same).scores, found.scores)
    with pytest.raises(ValueError, match="mode I;16, which needs converting to 8 bits"):
        predictor(Image.new("I;16", (32, 32)))
    turned.save(tmp_path / "turned.tif", exif=exif)
    for same in (tmp_path / "turned.tif", Image.open(tmp_path / "turned.tif")):
        with pytest.raises((BadImageError, ValueError), match="would be turned twice"):
            predictor(same)
    with pytest.raises(BadImageError, match="missing.png"):
        predictor(photos / "missing.png")
    with pytest.raises(ValueError, match="uint8, BGR"):
        predictor(np.zeros((8, 8)))


def test_damaged_images_are_named_and_left_out(checkpoint, photos, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name, length in (("cut.png", 900), ("empty.jpg", 0)):
        (tmp_path / "in" / name).write_bytes((photos / "a/photo.png").read_bytes()[:length])
    (tmp_path / "in/text.jpg").write_text("no image")
    text, _, images = predict(checkpoint, tmp_path / "out", tmp_path / "in", photos / "a")
    assert len(images["images"]) == 1 and "skipped: 3 of 4" in text
    error = capsys.readouterr().err
    assert all(f"{tmp_path}/in/{name}" in error for name in ("cut.png", "empty.jpg", "text.jpg"))
    before = (tmp_path / "out/images.json").read_bytes()
    for output in "none", "out":
        with pytest.raises(SystemExit) as stop:
            predict(checkpoint, tmp_path / output, tmp_path / "in")
        assert stop.value.code == 1
    assert (tmp_path / "out/images.json").read_bytes() == before


def test_names_that_meet(checkpoint, photos, tmp_path):
    """Also those that differ in suffix or case only, or are as long as a name may be."""
    source = (photos / "a/photo.png").read_bytes()
    names = ["x.png", "X.jpg", "x.bmp", "x-2.png", "é" * 120 + ".png", "new\nline.png", "-x.png"]
    for name in names:
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(source)
    _, _, images = predict(checkpoint, tmp_path / "out", tmp_path / "in", "--threshold", 0.9)
    pictures = [image["picture"] for image in images["images"]]
    assert len({p.casefold() for p in pictures}) == len(names)
    assert all("\n" not in p and (tmp_path / "out" / p).is_file() for p in pictures)
    assert len(files_in(tmp_path / "out/pictures")) == len(names)


def test_inputs(checkpoint, photos, tmp_path, monkeypatch):
    """Patterns, a file given twice, an output folder that lies in the input folder."""
    monkeypatch.chdir(photos)
    _, _, images = predict(checkpoint, tmp_path / "o", "a/photo.png", "**/*.png", "--threshold", 1)
    assert [i["file_name"] for i in images["images"]] == ["a/photo.png", "b/deep er/photo.png"]
    for output in "in/out", "same":
        folder = tmp_path / Path(output).parts[0]
        folder.mkdir()
        os.link(photos / "a/photo.png", folder / "photo.png")
        for _ in range(2):
            _, _, images = predict(checkpoint, tmp_path / output, folder, "--threshold", 1)
            assert len(images["images"]) == 1
    with pytest.raises(SystemExit, match="would overwrite the image"):
        predict(checkpoint, tmp_path / "in/out", tmp_path / "in/out/pictures/photo.jpg")
    for more, message in (
        (["--threshold", 2], "--threshold is 2"),
        (["--device", "gpu0"], "--device is 'gpu0'"),
        ([] if torch.cuda.is_available() else ["--device", "cuda"], "there is no GPU"),
    ):
        if more:
            with pytest.raises(SystemExit, match=message):
                predict(checkpoint, tmp_path / "none", photos, *more)
    with pytest.raises(SystemExit, match="'nothing' is no image"):
        predict(checkpoint, tmp_path / "none", "nothing")
    assert not (tmp_path / "none").exists()
    found = find_images([str(photos), "**/*.png"])  # as export_model.py does, which writes none
    assert (photos / "a/photo.png").resolve() in {path.resolve() for path in found}


def test_thin_image_is_left_out(checkpoint, photos, tmp_path, capsys):
    Image.new("RGB", (4000, 1)).save(tmp_path / "thin.png")
    _, _, images = predict(checkpoint, tmp_path / "out", tmp_path / "thin.png", photos / "a")
    assert len(images["images"]) == len(list((photos / "a").iterdir()))
    assert "thin.png: an image of 4000 x 1 pixels is too thin" in capsys.readouterr().err


def test_formats_of_images(checkpoint, photos, tmp_path, capsys, caplog):
    """What can be read is used, whatever its ending; what can't be read, or in part, is named."""
    folder = tmp_path / "in"
    folder.mkdir()
    image = Image.open(photos / "a/photo.png")
    more = [image, image]
    image.save(folder / "pages.tif", save_all=True, append_images=more)
    image.save(folder / "phone.mpo", format="MPO", save_all=True, append_images=more)
    names = ["pages.tif", "phone.mpo"]
    # Pillow may be built without these.
    for suffix, feature in ((".jp2", "jpg_2000"), (".avif", "avif")):
        if features.check(feature):
            names.append("x" + suffix)
            image.save(folder / names[-1])
    for other in ("IMG.HEIC", "raw.dng", "notes.pdf", "film.mpg"):
        (folder / other).touch()
    _, _, images = predict(checkpoint, tmp_path / "out", folder, "--threshold", 1)
    assert sorted(Path(i["file_name"]).name for i in images["images"]) == sorted(names)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "pages is used" in line]
    assert line.startswith(f"{folder}/pages.tif: the first of 3 pages")
    logging.getLogger("mabn_d2").propagate = True  # which the command has changed
    find_images([str(folder)], tmp_path / "out")
    assert f"left out: '{folder}' has 2 images of other formats, {folder}/IMG.HEIC" in caplog.text
    for name in names:
        (folder / name).unlink()
    with pytest.raises(SystemExit, match="has 2 images of other formats.*convert them to JPEG"):
        predict(checkpoint, tmp_path / "out", folder)


def test_picture_that_is_too_large_for_jpeg(checkpoint, tmp_path):
    Image.new("RGB", (66_000, 80)).save(tmp_path / "wide.png")
    _, _, images = predict(checkpoint, tmp_path / "out", tmp_path / "wide.png", "--threshold", 1)
    with Image.open(tmp_path / "out" / images["images"][0]["picture"]) as picture:
        assert picture.size == (65_500, 79)


@pytest.mark.parametrize(
    "fault, status", [("picture", "can't write .*photo-2.jpg"), ("key", "130")]
)
def test_what_was_predicted_is_kept(checkpoint, photos, tmp_path, monkeypatch, fault, status):
    """If the second picture can't be written, and on Ctrl-C while the second image is read."""
    if fault == "picture":
        (tmp_path / "pictures/photo-2.jpg").mkdir(parents=True)
    else:
        read = Predictor.read

        def interrupted(self, path):
            if "deep er" in str(path):
                os.kill(os.getpid(), signal.SIGINT)
            return read(self, path)

        monkeypatch.setattr(Predictor, "read", interrupted)
    # A shell's background process inherits SIGINT as ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit, match=status):
            predict(checkpoint, tmp_path, photos, "--threshold", 0.1)
    finally:
        signal.signal(signal.SIGINT, before)
    results, images = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("predictions", "images")
    )
    assert [Path(i["file_name"]).parent.name for i in images["images"]] == ["a"]
    assert results and {r["image_id"] for r in results} == {1}


@pytest.mark.parametrize("place", ["file", "file/out", "out"])
def test_output_that_cannot_be_written(checkpoint, photos, tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/pictures").touch()
    with pytest.raises(SystemExit, match="--output .* can't be written to .*: name another folder"):
        predict(checkpoint, tmp_path / place, photos)


def test_images_behind_a_link(checkpoint, photos, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(photos / "a")
    (tmp_path / "in/back").symlink_to(tmp_path / "in")
    assert len(find_images([str(tmp_path / "in")], tmp_path / "out")) == len(
        list((photos / "a").iterdir())
    )


def test_gray_images_for_a_model_of_gray_images(checkpoint, photos):
    """INPUT.FORMAT L: what Detectron2's mapper makes of a file."""
    predictor = load_predictor(checkpoint, "cpu")
    predictor.cfg.defrost()
    predictor.cfg.INPUT.FORMAT = "L"
    path = next((photos / "a").iterdir())
    mapper = DatasetMapper(predictor.cfg, is_train=False)
    wanted = mapper({"file_name": str(path)})["image"]
    found = predictor.to_tensor(predictor.read(path))
    assert found.shape == wanted.shape and len(found) == 1
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=2)


def test_links_in_the_output_folder_lead_nowhere(checkpoint, photos, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("keep")
    (tmp_path / "out/pictures").mkdir(parents=True)
    for name in ("pictures/photo.jpg", "predictions.json", "images.json"):
        (tmp_path / "out" / name).symlink_to(victim)
    predict(checkpoint, tmp_path / "out", photos / "a")
    assert victim.read_text() == "keep"


def test_checkpoint_without_config(checkpoint, photos, tmp_path):
    content = read_checkpoint(checkpoint)
    bare, file = tmp_path / "bare.pth", tmp_path / "config.yaml"
    write_checkpoint({"model": content["model"]}, bare)
    with pytest.raises(SystemExit, match="holds no config"):
        predict(bare, tmp_path / "out", photos)
    file.write_text(config().dump())
    _, results, images = predict(
        bare, tmp_path / "out", photos, "--config-file", file, "--threshold", 0.1
    )
    assert results and images["categories"][0] == {"id": 1, "name": "class 1"}


@pytest.mark.parametrize("architecture", ["SemanticSegmentor", "ProposalNetwork"])
def test_model_that_finds_no_objects(architecture, photos, tmp_path):
    cfg = config()
    cfg.MODEL.META_ARCHITECTURE = architecture
    write_checkpoint({"model": {}, "config": cfg.dump()}, tmp_path / "model.pth")
    with pytest.raises(SystemExit, match=f"is '{architecture}', which finds no objects of classes"):
        predict(tmp_path / "model.pth", tmp_path / "out", photos)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"config": "MODEL: [1"}, "is no config"),
        ({"config": "MODEL: !!python/object/apply:os.mkdir [trap]"}, "is no config"),
        ({"config": "[]"}, "is no config"),
        ({"classes": CLASSES[:3]}, "names 3 classes, and its model has 10"),
        ({"classes": [{"id": "x"}]}, "no list of ids and names"),
        ({"model": {"x": torch.zeros(1)}}, "x"),
    ],
)
def test_damaged_config_or_classes(checkpoint, tmp_path, change, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "changed.pth"
    write_checkpoint({**read_checkpoint(checkpoint), **change}, file)
    with pytest.raises(CheckpointError, match=message) as error:
        load_predictor(file, "cpu")
    assert "\n" not in str(error.value) and not (tmp_path / "trap").exists()


def test_config_with_unknown_keys(checkpoint, tmp_path, caplog):
    content = read_checkpoint(checkpoint)
    content["config"] += "\nNEW_KEY: 1\n"
    write_checkpoint(content, tmp_path / "newer.pth")
    load_predictor(tmp_path / "newer.pth", "cpu")
    assert "NEW_KEY" in caplog.text


def test_command(checkpoint, photos, tmp_path):
    """The command itself: an error is one line; progress goes to stderr."""
    command = [
        sys.executable,
        "tools/predict.py",
        "--checkpoint",
        str(tmp_path / "no.pth"),
        str(photos),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    (line,) = [x for x in done.stderr.splitlines() if "torch" not in x]
    assert done.returncode == 1 and line.startswith("predict.py: can't read")
