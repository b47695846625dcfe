import copy
import json

import pycocotools.mask as mask_util
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mabn_d2.data.coco_check import BadAnnotationError, _decoded_length, check_coco

GOOD = {
    "images": [{"id": 1, "file_name": "1.jpg", "height": 20, "width": 30}],
    "categories": [{"id": 3, "name": "digit"}],
    "annotations": [
        {"id": 7, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 10], "area": 100, "iscrowd": 0,
         "segmentation": [[1, 2, 11, 2, 11, 12]]},
    ],
}


def check(tmp_path, content, **kwargs):
    (tmp_path / "1.jpg").touch()
    file = tmp_path / "instances.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return check_coco(str(file), str(tmp_path), **kwargs)


def test_good_files(tmp_path, small_scenes):
    assert check(tmp_path, GOOD) == []
    for split in ("train", "val"):
        file = small_scenes / "annotations" / f"instances_{split}.json"
        if not file.exists():
            from detectron2.data import DatasetCatalog

            DatasetCatalog.get(f"small_scenes_{split}")
        assert check_coco(str(file), str(small_scenes / split)) == []


def edit(path, value):
    content = copy.deepcopy(GOOD)
    *keys, last = path
    node = content
    for key in keys:
        node = node[key]
    if value is KeyError:
        del node[last]
    else:
        node[last] = value
    return content


FATAL = [
    (json.dumps(GOOD)[:-20], "can't be read as JSON"),
    ("[]", "no list 'images'"),
    (edit(["categories"], KeyError), "no list 'categories'"),
    (edit(["images", 0, "height"], KeyError), "images 1 lacks height"),
    (edit(["annotations", 0, "bbox"], KeyError), "annotations 7 lacks bbox"),
    (edit(["annotations", 0, "category_id"], 9), "annotation 7 has the unknown category 9"),
    ({**GOOD, "annotations": GOOD["annotations"] * 2}, "annotations with the same id [7]"),
    ({**GOOD, "images": GOOD["images"] * 2}, "images with the same id [1]"),
]
SINGLE = [
    (edit(["images", 0, "file_name"], "2.jpg"), "image 1: no file"),
    (edit(["images", 0, "width"], 0), "image 1 has height 20, width 0"),
    (edit(["annotations", 0, "image_id"], 5), "annotation 7 belongs to image 5"),
    (edit(["annotations", 0, "bbox"], [40, 2, 10, 10]), "outside of the image"),
    (edit(["annotations", 0, "bbox"], [1, 2, float("nan"), 10]), "not four numbers"),
    (edit(["annotations", 0, "segmentation"], []), "no polygon"),
    (edit(["annotations", 0, "segmentation"], [[1, 2, 3, 4]]), "not three points"),
    (edit(["annotations", 0, "segmentation"], {"size": [30, 20], "counts": "0"}), "not the image's"),
    (edit(["annotations", 0, "segmentation"], {"size": [20, 30], "counts": [3, 4]}), "add up"),
    (edit(["annotations", 0, "segmentation"], {"size": [20, 30], "counts": "zzzz"}), "add up"),
]


@pytest.mark.parametrize("content, message", FATAL + SINGLE)
def test_problems_are_named(tmp_path, content, message):
    with pytest.raises(BadAnnotationError) as error:
        check(tmp_path, content)
    assert message in str(error.value) and "instances.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content, message", SINGLE)
def test_single_problems_can_be_skipped(tmp_path, content, message):
    (problem,) = check(tmp_path, content, skip=True)
    assert message in problem


@pytest.mark.parametrize("content, message", FATAL)
def test_fatal_problems_can_not(tmp_path, content, message):
    with pytest.raises(BadAnnotationError):
        check(tmp_path, content, skip=True)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_compressed_counts_as_pycocotools_writes_them(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.4
    counts = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
    assert _decoded_length(counts) == height * width


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 99) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["id", "bbox", "counts", "size"]), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.fuzz
@given(
    st.sampled_from([(key, 0, field) for key in GOOD for field in GOOD[key][0]]
                    + [(key, 0) for key in GOOD] + [(key,) for key in GOOD]),
    JSON,
)
def test_any_value_anywhere(tmp_path_factory, path, value):
    """Every replacement of a value is accepted or named: no other exception."""
    try:
        check(tmp_path_factory.mktemp("any"), edit(path, value))
    except BadAnnotationError as error:
        assert "instances.json" in str(error)
