"""Image folders: batches that resume, shares of ranks, bad files, bad folders."""

import itertools
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mabn_d2.classification.digit_crops import CropParams, make_digit_crops
from mabn_d2.classification.image_folder import (
    Images,
    ImagesError,
    ShuffledBatches,
    build_train_loader,
    build_val_loader,
    check_classes,
    read_image,
    train_transform,
    val_transform,
)
from mabn_d2.classification.processes import Processes
from mabn_d2.classification.training import say_what_is_left_out


@pytest.fixture
def folder(tmp_path):
    return make_digit_crops(tmp_path / "crops", CropParams(num_train=64, num_val=49))


def images(folder, split="train", bad="next"):
    transform = train_transform(24) if split == "train" else val_transform(24, 28)
    return Images(folder / split, transform, bad)


def take(loader, count):
    return list(itertools.islice(loader, count))


def damage(folder, keep=60):
    """Truncate the first image and return its path."""
    path = sorted(folder.rglob("*.png"))[0]
    path.write_bytes(path.read_bytes()[:keep])
    return str(path)


def test_batches_depend_on_the_iteration_alone(folder):
    train = images(folder)
    straight = take(build_train_loader(train, 8, seed=3), 9)
    resumed = take(build_train_loader(train, 8, seed=3, start=4, workers=2), 5)
    for (a, la, *_), (b, lb, *_) in zip(straight[4:], resumed, strict=True):
        assert torch.equal(a, b) and torch.equal(la, lb)
    assert straight[0][0].shape == (8, 3, 24, 24) and straight[0][0].dtype == torch.uint8
    other = take(build_train_loader(train, 8, seed=4), 1)
    assert not torch.equal(straight[0][0], other[0][0])


EXIT = """
import builtins, sys
from mabn_d2.classification.image_folder import Images, build_train_loader, build_val_loader, val_transform

images = Images(sys.argv[1], val_transform(24, 28), "error")
builtins.kept = [iter(build_train_loader(images, 4, 0, workers=1)), iter(build_val_loader(images, 4, 1))]
print([len(next(batches)[1]) for batches in kept])
"""


def test_a_process_ends_while_workers_still_load(folder):
    """Python ends what is left of them by SIGTERM and waits for them without limit."""
    command = [sys.executable, "-c", EXIT, str(folder / "train")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "[4, 4]\n", done.stderr


def test_every_image_comes_once_a_pass_over_the_ranks():
    ranks = [take(ShuffledBatches(40, 4, 0, rank, 2), 10) for rank in range(2)]
    keys = [key for step in zip(*ranks) for batch in step for key in batch]
    indices, seeds = zip(*keys)
    assert sorted(indices[:40]) == sorted(indices[40:]) == list(range(40))
    assert indices[:40] != indices[40:] and len(set(seeds)) == 80


def test_each_val_image_belongs_to_one_rank(folder):
    val = images(folder, "val", "drop")
    counts = [[len(labels) for _, labels, *_ in build_val_loader(val, 8, 0, r, 2)] for r in (0, 1)]
    assert counts == [[8, 8, 8, 1], [8, 8, 8]]


def test_a_file_that_is_no_image_is_skipped_and_named(folder):
    path = damage(folder / "train")
    batches = take(build_train_loader(images(folder), 8, seed=0), 8)
    assert [p for *_, bad, _ in batches for p in bad] == [path]
    assert all(len(labels) == 8 for _, labels, *_ in batches)
    path = damage(folder / "val")
    batches = list(build_val_loader(images(folder, "val", "drop"), 8))
    assert sum(len(labels) for _, labels, *_ in batches) == 48
    assert [p for *_, bad, _ in batches for p in bad] == [path]
    for workers in (0, 1):
        with pytest.raises(ImagesError) as error:
            list(build_val_loader(images(folder, "val", "error"), 8, workers))
        assert str(error.value).startswith(f"{path} can't be read (")
        assert str(error.value).endswith("): repair or remove it") and "\n" not in str(error.value)


def test_files_of_other_endings_are_named(folder, capsys):
    val = folder / "val"
    assert not images(folder, "val").others
    (val / "3/.DS_Store").touch()
    path = sorted(val.rglob("*.png"))[0].rename(val / "3/photo.jfif")
    found = images(folder, "val")
    assert found.others == [str(path)] and len(found) == 48
    say_what_is_left_out(Processes(0, 1), found)
    assert f"{val}: 1 files such as {path} are left out: images need" in capsys.readouterr().err
    with pytest.raises(ImagesError, match="photo.jfif are left out"):
        images(folder, "val", "error")


def test_an_image_too_large_to_decode_is_a_bad_one(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32 // 2 - 1)  # an error above twice
    with pytest.raises(ImagesError, match="decompression bomb"):
        images(folder, "val", "error")[0, 0]
    assert images(folder, "val", "drop")[0, 0][0] is None


def test_levels_are_those_of_the_rgb_original(tmp_path):
    levels = torch.randint(256, (20, 30, 3), dtype=torch.uint8).numpy()
    rgb = Image.fromarray(levels)
    grey = levels[..., 0]
    for name, image, expected in (
        ("rgb.png", rgb, levels),
        ("l.png", Image.fromarray(grey), grey[..., None]),
        ("i16.png", Image.fromarray(grey.astype(np.uint16) * 256 + 255), grey[..., None]),
        ("i32.tif", Image.fromarray(grey.astype(np.int32) * 256 + 255), grey[..., None]),
        ("rgba.png", rgb.convert("RGBA"), levels),
        ("cmyk.tif", rgb.convert("CMYK"), levels),
        ("palette.png", rgb.quantize(16), np.asarray(rgb.quantize(16).convert("RGB"))),
    ):
        image.save(tmp_path / name)
        found = read_image(tmp_path / name)
        assert found.mode == "RGB"
        assert (np.asarray(found) == expected).all(), name


def test_bad_folders_are_named(folder, tmp_path):
    with pytest.raises(ImagesError, match="there is no folder"):
        images(tmp_path / "nothing")
    (tmp_path / "empty/train").mkdir(parents=True)
    with pytest.raises(ImagesError, match="empty/train"):
        images(tmp_path / "empty")
    shutil.rmtree(folder / "val/7")
    with pytest.raises(ImagesError, match=r"lacks 1 classes of .*train \(7\)"):
        check_classes(images(folder), images(folder, "val"))
    for path in (folder / "val/3").iterdir():
        path.unlink()
    with pytest.raises(ImagesError, match="3"):
        images(folder, "val")


def test_digit_crops_are_whole_and_reproducible(folder, tmp_path):
    assert len(list((folder / "train").rglob("*.png"))) == 64
    more = make_digit_crops(tmp_path / "more", CropParams(num_train=65, num_val=49))
    for path in folder.rglob("*.png"):
        assert path.read_bytes() == (more / path.relative_to(folder)).read_bytes()
    with pytest.raises(ValueError, match="is not this dataset"):
        make_digit_crops(folder, CropParams(num_train=65, num_val=49))
