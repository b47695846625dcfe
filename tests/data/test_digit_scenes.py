import multiprocessing
import os
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from pycocotools.coco import COCO

from mabn_d2.data import digit_scenes as ds

SMALL = ds.SceneParams(num_train=12, num_val=6)
make = partial(ds.make_digit_scenes, params=SMALL, progress=False)


def files(folder):
    return {f"{p.parent.name}/{p.name}": p.read_bytes() for p in folder.glob("*/*")}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make(tmp_path_factory.mktemp("root") / "digit_scenes")


@pytest.mark.parametrize("split, count", [("train", 12), ("val", 6)])
def test_annotations(small, split, count):
    coco = COCO(small / f"annotations/instances_{split}.json")
    assert len(coco.imgs) == count and min(coco.imgs) == min(coco.anns) == 1
    assert {a["digit"] for a in coco.anns.values()} <= set(ds.split_digits(SMALL.seed)[split])
    for annotations in coco.imgToAnns.values():
        masks = [coco.annToMask(a) for a in annotations]
        assert 2 <= len(masks) <= 5 and np.sum(masks, 0).max() == 1  # no pixel in two masks
        for (y, x), a in zip(map(np.nonzero, masks), annotations):
            assert a["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert a["area"] == len(x) and a["iscrowd"] == 0 and a["visible"] >= 0.7


def test_sources_seed_and_light(small, tmp_path):
    train, val = map(ds.load_sources, ds.SPLITS)
    assert sorted([*train.indices, *val.indices]) == list(range(1797))
    assert all(a.shape[1] + b.shape[1] == 640 for a, b in zip(train.photos, val.photos))
    for change, same in ("num_train", True), ("seed", False):
        other = make(tmp_path / change, params=replace(SMALL, **{change: 3}))
        image, again = (files(d)["train/000003.jpg"] for d in (small, other))
        assert (image == again) is same
    lit = replace(SMALL, light_sigma=0.5, cast_sigma=0.5)
    a, b = (ds.render_scene(np.random.default_rng(3), train, p) for p in (SMALL, lit))
    assert (a.masks == b.masks).all() and (a.image != b.image).any()


def race(folder, barrier):  # both have written everything when they rename
    os.rename = lambda *paths, rename=os.rename: (barrier.wait(60), rename(*paths))
    make(folder)


def test_two_processes(small, tmp_path):
    spawn, folder = multiprocessing.get_context("spawn"), tmp_path / "root/d"
    barrier = spawn.Barrier(2)
    ranks = [spawn.Process(target=race, args=(folder, barrier)) for _ in range(2)]
    [rank.start() for rank in ranks]
    assert [rank.join(240) or rank.exitcode for rank in ranks] == [0, 0]
    assert os.listdir(folder.parent) == ["d"] and files(folder) == files(small)


def test_interrupted(small, tmp_path, monkeypatch):
    (tmp_path / ".d-killed/d/train").mkdir(parents=True)  # what a killed process leaves
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(ds, "render_scene", lambda *_: 1 / 0)
        make(tmp_path / "d")
    assert os.listdir(tmp_path) == [".d-killed"]  # nothing new
    assert files(make(tmp_path / "d")) == files(small)


def test_clear_errors(tmp_path, monkeypatch):
    (make(tmp_path / "d") / "val/000002.jpg").unlink()
    for name, changes, message in [
        ("d", {"seed": 1, "noise_sigma": 0}, "other noise_sigma, seed.*remove that folder"),
        ("d", {}, "misses files"),
        ("", {}, "no whole digit-scene dataset"),
        ("new", {"num_digits": (30, 30)}, "no place for 30 digits"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(tmp_path / name, params=replace(SMALL, **changes))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"sklearn.*pip install 'mabn_d2\[data\]'"):
        make(tmp_path / "new")


def test_register(tmp_path, monkeypatch):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for _ in range(2):
        ds.register_digit_scenes(name="small", params=SMALL)
    assert os.listdir(tmp_path) == []  # made on first use
    assert [len(DatasetCatalog.get(f"small_{split}")) for split in ds.SPLITS] == [12, 6]
    metadata = MetadataCatalog.get("small_val")
    assert metadata.evaluator_type == "coco" and metadata.thing_classes == list("0123456789")
