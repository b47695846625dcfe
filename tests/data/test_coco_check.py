import copy
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import detection_utils
from detectron2.data.datasets import load_coco_json
from detectron2.data.transforms import HFlipTransform, TransformList
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from mabn_d2.data import BadAnnotationError
from mabn_d2.data.coco_check import Edit, apply_edits, check_coco, inspect
from mabn_d2.data.coco_masks import decoded_lengths
from paths import ROOT

GOOD = {
    "images": [{"id": 1, "file_name": "1.jpg", "height": 20, "width": 30}],
    "categories": [{"id": 3, "name": "digit"}],
    "annotations": [
        {
            "id": 7,
            "image_id": 1,
            "category_id": 3,
            "bbox": [1, 2, 10, 10],
            "area": 100,
            "iscrowd": 0,
            "segmentation": [[1, 2, 11, 2, 11, 12]],
        },
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
    if isinstance(node, list) and last >= len(node):
        node.append(value)
    elif value is KeyError:
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
CRASHED = {  # pycocotools or Detectron2, each by an annotation of its own
    "bbox": ["abcd", None, [1, 2, 10], [1, 2, "a", 3], [1, 2, float("nan"), 10], [1, 2, 10**400, 5]],
    "segmentation": [
        [[1, 2, 1e30, 2, 11, 12]], [[1, 2, float("nan"), 2, 11, 12]], [[1, 2, -9e9, 2, 11, 12]],
        [[1, 2, 10**400, 2, 11, 12]], ["abcdef"], "abcdef", [[1, None, 11, 2, 11, 12]], 7,
        {"size": [20, 30], "counts": [2**40]}, {"size": [20, 30]}, {"size": [20, 30], "counts": 5},
    ],
    "iscrowd": ["a", 2], "ignore": [1], "keypoints": [["a", 1, 2], 5],
}  # fmt: skip
SINGLE = [
    (edit(["images", 0, "file_name"], "2.jpg"), "image 1: no file"),
    (edit(["images", 0, "width"], 0), "image 1 has height 20, width 0"),
    (edit(["annotations", 0, "image_id"], 5), "annotation 7 belongs to image 5"),
    (edit(["annotations", 0, "bbox"], [40, 2, 10, 10]), "outside of the image"),
    (edit(["annotations", 0, "segmentation"], [[1, 2, 61, 2, 11, 12]]), "far outside"),
    (
        edit(["annotations", 0, "segmentation"], {"size": [30, 20], "counts": "0"}),
        "not the image's",
    ),
    (edit(["annotations", 0, "segmentation"], {"size": [20, 30], "counts": [3, 4]}), "add up"),
    (edit(["annotations", 0, "segmentation"], {"size": [20, 30], "counts": "zzzz"}), "add up"),
    (edit(["images", 0, "file_name"], 5), "image 1: no file"),
    *(
        (edit(["annotations", 0, key], value), "annotation 7 (image 1) has")
        for key, values in CRASHED.items()
        for value in values
    ),
]


@pytest.mark.parametrize("content, message", FATAL + SINGLE)
def test_problems_are_named(tmp_path, content, message):
    with pytest.raises(BadAnnotationError) as error:
        check(tmp_path, content)
    assert message in str(error.value) and f"{tmp_path}/instances.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_to_do_is_said(tmp_path):
    for kwargs, remedy in (({}, 'BAD_INPUT to "skip"'), ({"remedy": "or else"}, "file, or else")):
        with pytest.raises(BadAnnotationError, match=f"Correct the .*{remedy}"):
            check(tmp_path, SINGLE[0][0], **kwargs)


@pytest.mark.parametrize("content, message", SINGLE)
def test_single_problems_can_be_skipped(tmp_path, content, message):
    (problem,) = check(tmp_path, content, skip=True)
    assert message in str(problem)
    (tmp_path / "3.jpg").touch()
    content["images"].append({**content["images"][0], "id": 99, "file_name": "3.jpg", "width": 30})
    problems = check(tmp_path, content, skip=True)
    apply_edits(content, [Edit(p.key, p.position, None) for p in problems])
    (tmp_path / "clean.json").write_text(json.dumps(content))
    for record in load_coco_json(str(tmp_path / "clean.json"), str(tmp_path)):
        assert not record["annotations"]


@pytest.mark.parametrize("content, message", FATAL)
def test_fatal_problems_can_not(tmp_path, content, message):
    with pytest.raises(BadAnnotationError):
        check(tmp_path, content, skip=True)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_compressed_counts_as_pycocotools_writes_them(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.4
    counts = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
    assert decoded_lengths([counts, "zzzz", counts]).tolist() == [
        height * width,
        -1,
        height * width,
    ]


TRAINS = """
import sys
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from mabn_d2.engine import Trainer, check_data, setup_config
from detectron2.engine import default_argument_parser

file, images, *options = sys.argv[1:]
register_coco_instances("faulty", {}, file, images)
cfg = setup_config(default_argument_parser().parse_args(["--num-gpus", "0", *options]))
check_data(cfg)
trainer = Trainer(cfg)
assert len(trainer.data_loader.dataset) == 3
trainer.train()
print("kept", [len(r["annotations"]) for r in trainer.data_loader.dataset.records])
"""


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_training_on_a_file_with_every_fault(tmp_path, small_scenes, policy):
    from detectron2.data import DatasetCatalog

    DatasetCatalog.get("small_scenes_train")
    content = json.loads((small_scenes / "annotations" / "instances_train.json").read_text())
    content["images"] = content["images"][:4]
    content["images"][3]["file_name"] = "missing.jpg"
    good = [a for a in content["annotations"] if a["image_id"] <= 4]
    good[0]["segmentation"] = [[5, 5, 60, 60, 60, 5, 5, 60]]  # crosses itself: drawn as it is
    size = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 40, 40], "iscrowd": 0}
    content["annotations"] = good + [
        {"id": 1000 + 20 * i + k, **size, "segmentation": [[1, 2, 40, 2, 40, 40]], key: value}
        for i, (key, values) in enumerate(CRASHED.items())
        for k, value in enumerate(values)
    ]
    file = tmp_path / "faulty.json"
    file.write_text(json.dumps(content))
    options = [
        "--config-file",
        "configs/digits/scratch_mask_rcnn_R18_FPN_mabn.yaml",
        "DATASETS.TRAIN",
        "('faulty',)",
        "DATASETS.TEST",
        "()",
        "SOLVER.MAX_ITER",
        "2",
        "DATALOADER.BAD_INPUT",
        policy,
        "OUTPUT_DIR",
        str(tmp_path / "output"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", TRAINS, str(file), str(small_scenes / "train"), *options], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    if policy == "stop":
        assert done.returncode == 1
        assert f"{file}: image 4: no file" in done.stderr and "annotation 1000" in done.stderr
        return
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [sum(a["image_id"] == k for a in good) for k in (1, 2, 3)]
    assert f"kept {counts}" in done.stdout


def consume(file, folder):
    """Read a file as the training does, in a process that may crash; return its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # pytest's own handler would wait for the interpreter, which may hang in compiled code.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            torch.set_num_threads(1)  # OpenMP's threads do not exist in a forked process
            pages = int(open("/proc/self/statm").read().split()[0])
            more = pages * os.sysconf("SC_PAGE_SIZE") + 2**30
            resource.setrlimit(resource.RLIMIT_AS, (more, more))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for record in load_coco_json(file, folder, "fuzzed"):
                size = record["height"], record["width"]
                flip = TransformList([HFlipTransform(size[1])])
                try:  # what is raised here, not what crashes, is the mapper's to name
                    detection_utils.annotations_to_instances(
                        [
                            detection_utils.transform_instance_annotations(annotation, flip, size)
                            for annotation in record["annotations"]
                        ],
                        size,
                        "bitmask",
                    )
                except Exception:
                    pass
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 99) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["id", "bbox", "counts", "size"]), inner, max_size=3)
    ),
    max_leaves=8,
)


PATHS = [
    *((key,) for key in GOOD), *((key, 0) for key in GOOD),
    *((key, 0, field) for key in GOOD for field in GOOD[key][0]),
    *(("annotations", 0, field) for field in ("ignore", "keypoints")),
    *(("annotations", 0, "bbox", k) for k in range(5)),
    *(("annotations", 0, "segmentation", k) for k in range(2)),
    *(("annotations", 0, "segmentation", 0, k) for k in range(7)),
]  # fmt: skip


@pytest.mark.fuzz
@given(st.sampled_from(PATHS), JSON | st.integers() | st.floats(-1e3, 1e3))
@example(("annotations", 0, "bbox"), "abcd")
@example(("annotations", 0, "bbox"), None)
@example(("annotations", 0, "bbox", 2), 10**400)
@example(("annotations", 0, "segmentation"), "abcdef")
@example(("annotations", 0, "segmentation", 0, 2), 1e30)
@example(("annotations", 0, "segmentation", 0, 2), float("nan"))
@example(("annotations", 0, "segmentation"), {"size": [20, 30], "counts": [2**40]})
@example(("annotations", 0, "keypoints"), 5)
@example(("categories", 0, "name"), 5)
@example(("images", 0, "file_name"), 5)
def test_any_value_anywhere(tmp_path_factory, path, value):
    """Every value in every place is named or left out; what is accepted is read without a crash."""
    folder = tmp_path_factory.mktemp("any")
    file = str(folder / "instances.json")
    try:
        content = json.loads(json.dumps(edit(path, value)))
        for evaluation in (False, True):
            check(folder, content, skip=True, evaluation=evaluation)
        found = inspect(content, file, str(folder))
        left_out = [Edit(p.key, p.position, None) for p in found.problems]
        apply_edits(content, [*found.edits, *left_out])
        (folder / "instances.json").write_text(json.dumps(content))
    except BadAnnotationError as error:
        assert "instances.json" in str(error)
    else:
        assert consume(file, str(folder)) == 0


BOX = {"bbox": [1, 2, 10, 10]}
EMPTY_RLE = {"size": [20, 30], "counts": [600]}
ENCODED = mask_util.encode(np.asfortranarray(np.zeros((20, 30), np.uint8)))


@pytest.mark.parametrize(
    "masks, note",
    [
        ([[0.1, 0.2, 0.9, 0.2, 0.9, 0.8]], "lie within 0..1: are they shares"),
        ([[2, 3, 7, 3, 11, 3]], "have no area"),
        ([[2, 3, 5, 6, 9, 10]], "have no area"),
        (EMPTY_RLE, "have no area"),
        ({"size": [20, 30], "counts": ENCODED["counts"].decode()}, "have no area"),
        ([[20, 13, 28, 13, 28, 19]], "lie outside of their box"),
        ([[2, 3, 7, 3, 11, 3], [2, 3, 9, 3, 9, 9]], None),
        ([[1, 2, 11, 12, 11, 2, 1, 12]], None),  # crosses itself
        ([[1, 2, 6, 2, 6, 7]], "have other bounds than their box"),
        ([[6, 7, 11, 7, 11, 12]], "have other bounds than their box"),  # of a box from its centre
    ],
)
def test_masks_that_contradict_their_boxes(tmp_path, caplog, masks, note):
    content = edit(("annotations", 0, "segmentation"), masks)
    check(tmp_path, content)
    found = [r.message for r in caplog.records if " masks " in r.message]
    assert len(found) == (note is not None)
    if note:
        assert f"1 of 1 masks {note}" in found[0] and "annotation 7" in found[0]
    caplog.clear()
    check(tmp_path, content, masks=False)
    assert not [r for r in caplog.records if " masks " in r.message]


def test_lists_of_another_form(tmp_path, caplog):
    """VIA has one polygon without a list around it, others have pairs, or an RLE in a list."""
    points = [[1, 2], [11, 2], [11, 12]]
    for masks in ([1, 2, 11, 2, 11, 12], [points], points, [EMPTY_RLE]):
        content = edit(("annotations", 0, "segmentation"), masks)
        findings = inspect(content, "x.json", str(tmp_path_of(tmp_path)), evaluation=True)
        (value,) = (e.value for e in findings.edits if e.field == "segmentation")
        assert value in ([[1, 2, 11, 2, 11, 12]], EMPTY_RLE) and not findings.problems
        assert not [note for note in findings.notes if "masks" in note and "no area" not in note]
        assert findings.summary.objects_with_rle == (value == EMPTY_RLE)


def tmp_path_of(folder):
    """Return a folder with the image of GOOD."""
    Image.new("RGB", (30, 20)).save(folder / "1.jpg")
    return folder


@pytest.mark.parametrize(
    "change, evaluation, note",
    [
        ({"bbox": [-4, 2, 10, 10]}, False, "1 of 1 boxes end more than a pixel outside"),
        ({"bbox": [-4, -3, 40, 40]}, True, "1 of 1 boxes end more than a pixel outside"),
        ({"attributes": {"rotation": 45.0}, "segmentation": []}, False, "1 of 1 boxes are rotated"),
        ({"attributes": {"rotation": 0.0}, "segmentation": []}, False, None),
        ({"attributes": {"rotation": 45.0}}, False, None),  # the polygon is right
    ],
)
def test_doubtful_boxes(tmp_path, change, evaluation, note):
    content = copy.deepcopy(GOOD)
    content["annotations"][0].update(change)
    findings = inspect(
        content, "x.json", str(tmp_path_of(tmp_path)), masks=False, evaluation=evaluation
    )
    assert not findings.problems
    assert [n for n in findings.notes if "boxes" in n and note and note in n] or note is None
    assert note or not findings.notes
    boxes = [e.value for e in findings.edits if e.field == "bbox"]
    assert boxes == ([[0, 0, 30, 20]] if evaluation else [])  # AP needs what a model can predict


def test_objects_that_are_there_twice(tmp_path):
    content = copy.deepcopy(GOOD)
    (annotation,) = content["annotations"]
    content["annotations"] += [
        {**annotation, "id": 8},
        {**annotation, "id": 9, "bbox": [1, 2, 9, 9]},
    ]
    notes = inspect(content, "x.json", str(tmp_path_of(tmp_path))).notes
    assert any("1 of 3 annotations repeat another" in n and "annotation 7" in n for n in notes)


def test_entries_that_share_an_image(tmp_path):
    """Each has a part of its objects: neither can be used. The same objects in both are sound."""
    content = copy.deepcopy(GOOD)
    content["images"].append({**content["images"][0], "id": 2, "file_name": "./1.jpg"})
    with pytest.raises(
        BadAnnotationError, match="image 1: .*1.jpg is also image 2, with other objec"
    ):
        check(tmp_path, content)
    found = inspect(content, "x.json", str(tmp_path_of(tmp_path)))
    assert [p.position for p in found.problems] == [0, 1] and found.summary.images_with_objects == 0
    content["annotations"].append({**content["annotations"][0], "id": 8, "image_id": 2})
    assert check(tmp_path, content) == []


def test_negative_width_is_called_so(tmp_path):
    with pytest.raises(BadAnnotationError, match="with a negative width or height"):
        check(tmp_path, edit(("annotations", 0, "bbox"), [11, 2, -10, 10]))


@pytest.mark.parametrize("area", [-100, None, float("nan"), 0, 30_000])
def test_area_that_is_none(tmp_path, area):
    """Of a polygon the other way round: negative. The evaluation would leave the object out."""
    (tmp_path / "1.jpg").touch()
    findings = inspect(
        edit(("annotations", 0, "area"), area), "x.json", str(tmp_path), evaluation=True
    )
    assert [e.value for e in findings.edits if e.field == "area"] == [pytest.approx(50, abs=15)]


@pytest.mark.parametrize(
    "mode, orientation, reason",
    [
        (None, 1, "cannot identify"),
        ("I;16", 1, "8 bits a channel"),
        ("F", 1, "8 bits a channel"),
        ("RGB", 3, "would be turned twice: save it upright"),
    ],
)
def test_images_that_an_evaluation_cannot_read(tmp_path, mode, orientation, reason):
    """It would end there, after the training up to it, or compare with a picture turned twice."""
    if mode:
        Image.new(mode, (30, 20)).save(
            tmp_path / "1.jpg", format="TIFF", tiffinfo={274: orientation}
        )
    with pytest.raises(BadAnnotationError, match=rf"image 1: .*1.jpg can't be read \(.*{reason}"):
        check(tmp_path, GOOD, evaluation=True)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_image_whose_exif_is_damaged_or_says_nothing(tmp_path, format, caplog):
    settings = {"tiffinfo": {274: 1}} if format == "TIFF" else {"exif": b"Exif\0\0damaged"}
    Image.new("RGB", (30, 20)).save(tmp_path / "1.jpg", format=format, **settings)
    check(tmp_path, GOOD, evaluation=True)
    assert "can't be read" not in caplog.text


def test_images_that_cannot_be_read(tmp_path, caplog):
    check(tmp_path, GOOD)
    assert "1 of 1 image files that were looked at can't be read, such as" in caplog.text
