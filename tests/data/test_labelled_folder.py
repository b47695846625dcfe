"""Layouts of labelling tools: parts, images, classes."""

import gc
import json
import os
import shutil
import unicodedata

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from exports import LAYOUTS, MASKS, NAMES, UNDIVIDED, edit, write_export
from mabn_d2.data.coco_check import BadAnnotationError
from mabn_d2.data.labelled_folder import (
    find_layout,
    mask_kind,
    prepare_folder,
    read_folder,
    register_prepared,
    report,
)
from mabn_d2.data.labelled_folder.contents import image_hash


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """One folder of each layout; not to be changed."""
    root = tmp_path_factory.mktemp("exports")
    return {layout: write_export(root / layout, layout) for layout in LAYOUTS}


@pytest.fixture
def export(exports, tmp_path):
    """Return a function that copies the folder of a layout."""
    return lambda layout: shutil.copytree(exports[layout], tmp_path / layout)


def register_folder(path):
    """Return {part: name of the dataset}."""
    return register_prepared(prepare_folder(path))


def image_paths(records):
    return {record["file_name"] for record in records}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(exports, layout):
    names = register_folder(exports[layout])
    records = {key: DatasetCatalog.get(name) for key, name in names.items()}
    assert list(records) == ["train", "val"]
    sizes = [len(records[key]) for key in ("train", "val")]
    assert sum(sizes) == 16 and (0 < sizes[1] < 16 if layout in UNDIVIDED else sizes == [12, 4])
    assert not image_paths(records["train"]) & image_paths(records["val"])
    for name in names.values():
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == NAMES and metadata.evaluator_type == "coco"
    seen = set()
    for record in (*records["train"], *records["val"]):
        with Image.open(record["file_name"]) as image:
            assert image.size == (record["width"], record["height"])
        assert record["annotations"]
        seen |= {annotation["category_id"] for annotation in record["annotations"]}
    assert seen <= set(range(10)) and len(seen) > 5


def test_classes_are_the_labels_of_the_scenes(exports):
    """The same scenes, written by each tool with ids of its own, have the same classes."""

    def classes(layout):
        names = register_folder(exports[layout])
        records = [r for name in names.values() for r in DatasetCatalog.get(name)]
        return sorted(tuple(a["category_id"] for a in r["annotations"]) for r in records)

    assert classes("roboflow") == classes("coco")
    assert classes("cvat") == classes("label_studio") == classes("json")


@pytest.mark.parametrize("masks", MASKS)
def test_kind_of_masks(tmp_path, masks):
    prepared = prepare_folder(write_export(tmp_path / "e", "coco", masks, (3, 1)))
    wanted = {"boxes": None, "polygons": "polygon", "rle": "rle"}
    assert mask_kind(prepared.summaries) == wanted[masks]


def test_held_out_images_depend_on_their_names_alone(export, tmp_path):
    folder = export("json")
    held_out = {i["file_name"] for i in read_folder(folder).parts["val"].coco["images"]}
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    assert {i["file_name"] for i in read_folder(moved).parts["val"].coco["images"]} == held_out
    # More images: those that were there stay where they were.
    for i in range(100, 140):
        shutil.copy(moved / "1.jpg", moved / f"{i}.jpg")
    images = json.loads((moved / "labels.json").read_text())["images"]
    more = [{**images[1], "id": i, "file_name": f"{i}.jpg"} for i in range(100, 140)]
    edit(moved / "labels.json", lambda c: c["images"].extend(more))
    now = {i["file_name"] for i in read_folder(moved).parts["val"].coco["images"]}
    assert held_out <= now and held_out == now & {f"{i}.jpg" for i in range(16)}
    assert 0.05 < len(now) / 56 < 0.4  # 0.2 is wanted


@pytest.mark.parametrize("share", [1e-9, 0.2, 1 - 1e-9])
@pytest.mark.parametrize("labelled", [2, 3, 16])
def test_both_parts_have_objects(export, share, labelled):
    folder = export("json")
    ids = set(range(1, labelled + 1))
    edit(
        folder / "labels.json",
        lambda c: c.update(annotations=[a for a in c["annotations"] if a["image_id"] in ids]),
    )
    parts = read_folder(folder, share).parts
    for part in parts.values():
        assert part.coco["annotations"] and part.coco["images"]
    assert sum(len(part.coco["images"]) for part in parts.values()) == 16


def test_one_labelled_image_is_too_few(export):
    folder = export("json")
    edit(folder / "labels.json", lambda c: c.update(annotations=c["annotations"][:1]))
    with pytest.raises(BadAnnotationError, match="at least two"):
        read_folder(folder)


def test_hash_is_that_of_every_machine():
    assert image_hash("a/b.jpg") == image_hash("a\\b.jpg") == pytest.approx(0.2903044, abs=1e-6)
    assert image_hash("é.jpg") == image_hash(unicodedata.normalize("NFD", "é.jpg"))


@pytest.mark.parametrize(
    "spelling",
    [
        "{}.jpg",
        "./{}.jpg",
        "photos/{}.jpg",
        "photos\\{}.jpg",
        "C:\\Users\\me\\my photos\\{}.jpg",
        "\\\\server\\share\\{}.jpg",
        "/home/somebody/data/{}.jpg",
        "../../label-studio/media/upload/4/{}.jpg",
        "https://host/data/upload/1/{}.jpg",
        "/data/local-files/?d=project%2Fimages%2F{}.jpg",
        "file%20{}.jpg",
    ],
)
def test_spellings_of_file_names(tmp_path, spelling):
    folder = write_export(tmp_path / "e", "json", sizes=(3, 1))
    for i in range(4):
        (folder / f"{i}.jpg").rename(
            folder / ("file {}.jpg" if "%20" in spelling else "{}.jpg").format(i)
        )
    edit(
        folder / "labels.json",
        lambda c: [i.update(file_name=spelling.format(n)) for n, i in enumerate(c["images"])],
    )
    assert_all_found(folder, 4)


def assert_all_found(folder, count):
    names = register_folder(folder)
    records = [r for name in names.values() for r in DatasetCatalog.get(name)]
    paths = {os.path.realpath(path) for path in image_paths(records)}
    assert len(paths) == count and all(os.path.isfile(path) for path in paths)


@pytest.mark.parametrize("nested", ["deep/er {}", "Übung {}/a"])
def test_images_in_nested_folders(tmp_path, nested):
    """The JSON file names them without folders; accents are decomposed, as by a Mac."""
    folder = write_export(tmp_path / "e", "json", sizes=(3, 1))
    for i in range(4):
        target = folder / unicodedata.normalize("NFD", nested.format(i)) / f"Bild_{i}.JPG"
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").rename(target)
    edit(
        folder / "labels.json",
        lambda c: [i.update(file_name=f"bild_{n}.jpg") for n, i in enumerate(c["images"])],
    )
    assert_all_found(folder, 4)


def test_equal_names_in_two_folders(tmp_path):
    """The rest of the path decides; an image that two entries would share is an error."""
    folder = write_export(tmp_path / "e", "json", sizes=(3, 1))
    for i in range(4):
        target = folder / "all" / f"cam{i}" / "frame.jpg"
        target.parent.mkdir(parents=True)
        (folder / f"{i}.jpg").rename(target)
    edit(
        folder / "labels.json",
        lambda c: [
            i.update(file_name=f"D:\\x\\cam{n}\\frame.jpg") for n, i in enumerate(c["images"])
        ],
    )
    assert_all_found(folder, 4)
    shutil.move(folder / "all/cam0/frame.jpg", folder / "frame.jpg")
    shutil.rmtree(folder / "all")
    with pytest.raises(BadAnnotationError, match=r"would both be the image .*frame\.jpg"):
        read_folder(folder)


@pytest.mark.parametrize("name", ["coco128.yaml", "labels.csv"])
def test_file_of_another_format(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(BadAnnotationError, match=f"{name} is .*: export the labels as COCO JSON"):
        read_folder(tmp_path / name)


def test_annotations_with_a_capital(export):
    folder = export("coco")
    (folder / "annotations").rename(folder / "Annotations")
    for path in (folder, folder / "Annotations/instances_train2017.json"):
        parts = read_folder(path).parts
        assert parts["train"].image_root == folder / "train2017"


def test_export_without_images(export):
    folder = export("cvat")
    shutil.rmtree(folder / "images")
    with pytest.raises(BadAnnotationError, match="none of them is in .*: export with images"):
        read_folder(folder)


def test_single_file(exports):
    assert find_layout(exports["json"] / "labels.json").parts.keys() == {"all"}
    file = exports["coco"] / "annotations" / "instances_train2017.json"
    parts = read_folder(file).parts
    assert sum(len(part.coco["images"]) for part in parts.values()) == 12
    assert all(part.image_root.name == "train2017" for part in parts.values())


def test_subsets_of_cvat(export):
    folder = export("cvat")
    annotations = folder / "annotations"
    content = json.loads((annotations / "instances_default.json").read_text())
    (annotations / "instances_default.json").unlink()
    for name, ids in (("Train", range(1, 13)), ("Validation", range(13, 17))):
        part = {
            **content,
            "images": [i for i in content["images"] if i["id"] in ids],
            "annotations": [a for a in content["annotations"] if a["image_id"] in ids],
        }
        (annotations / f"instances_{name}.json").write_text(json.dumps(part))
    parts = read_folder(folder).parts
    assert [len(part.coco["images"]) for part in parts.values()] == [12, 4]


def test_two_json_files(export, monkeypatch):
    """Each is parsed once, while the garbage collector pauses."""
    folder = export("roboflow")
    for part in ("train", "valid"):
        (folder / part / "_annotations.coco.json").rename(folder / f"{part}.json")
    (folder / "package.json").write_text("{}")
    loads, collects = json.loads, []

    def spied(text):
        collects.append(gc.isenabled())
        return loads(text)

    monkeypatch.setattr(json, "loads", spied)
    parts = read_folder(folder).parts
    assert [len(part.coco["images"]) for part in parts.values()] == [12, 4]
    assert collects == [False] * 3 and gc.isenabled()


def test_test_part_is_not_trained_on(export):
    folder = export("roboflow")
    (folder / "valid").rename(folder / "test")
    parts = read_folder(folder).parts
    assert parts.keys() == {"train", "val", "test"} and len(parts["test"].coco["images"]) == 4
    assert len(parts["train"].coco["images"]) + len(parts["val"].coco["images"]) == 12


UNKNOWN = [
    (lambda f: shutil.rmtree(f / "train"), "no part to train on, only .*valid/_annotations"),
    (lambda f: shutil.copytree(f / "train", f / "training"), "several annotation files"),
    (lambda f: shutil.copy(f / "train/_annotations.coco.json", f / "result.json"), "several"),
    (lambda f: [shutil.rmtree(f / p) for p in ("train", "valid")], "looked for train/_annotations"),
    (lambda f: [shutil.rmtree(f / "train"), shutil.rmtree(f / "valid"),
                (f / "data.yaml").write_text("")], r"data\.yaml is YOLO"),
    (lambda f: [(f / "in").mkdir(), *(shutil.move(f / p, f / "in") for p in ("train", "valid"))],
     "or name .*/in if it is the export"),
    (lambda f: [shutil.rmtree(f / "train"), (f / "valid").rename(f / "images"),
                (f / "images/_annotations.coco.json").unlink()], "export the labels as COCO JSON$"),
    (lambda f: [shutil.rmtree(f / p) for p in ("train", "valid")] + [(f / "Annotations").mkdir(),
                (f / "Annotations/1.xml").touch()], r"\(Annotations/1.xml is Pascal VOC"),
    (shutil.rmtree, r"does not exist: .* \(--data FOLDER, .* DATASETS.FOLDER"),
    (lambda f: [shutil.rmtree(f), f.write_text("")], "unpack an archive"),
    (lambda f: (f / "train/_annotations.coco.json").write_text("[1"), "can't be read as JSON"),
    (lambda f: (f / "train/_annotations.coco.json").write_text("[]"), "no list 'images'"),
    (lambda f: edit(f / "train/_annotations.coco.json", lambda c: c.update(categories=[])),
     "unknown category"),
    (lambda f: edit(f / "valid/_annotations.coco.json",
                    lambda c: [k.update(name="neun") for k in c["categories"]]),
     "two categories have the name 'neun'"),
]  # fmt: skip


@pytest.mark.parametrize(
    "files, message",
    [
        ({"Annotations/1.xml": "", "JPEGImages/1.jpg": ""}, "Annotations/1.xml is Pascal VOC"),
        (
            {"train/1.xml": "", "valid/2.xml": ""},
            "train/1.xml is Pascal VOC or CVAT XML, which CVAT",
        ),
        ({"images/1.jpg": "", "labels/1.txt": ""}, "labels/1.txt is YOLO, which CVAT and Roboflow"),
        ({"train/labels/1.txt": "", "valid/labels/2.txt": ""}, "train/labels/1.txt is YOLO"),
        ({"images/1.jpg": "", "masks/1.png": ""}, "masks/1.png is a mask as a picture"),
        (
            {f"{i}.json": '{"shapes": [], "imagePath": "1.jpg"}' for i in (1, 2)},
            "1.json is LabelMe",
        ),
        ({"1.json": '{"shapes": [], "imagePath": "1.jpg"}'}, "this is LabelMe's own"),
        ({"a.json": '{"1.jpg77": {"filename": "1.jpg", "regions": []}}'}, "this is VIA's own"),
        ({"a.json": '{"_via_settings": {}, "_via_img_metadata": {}}'}, "this is VIA's own"),
        ({"a.json": '[{"id": 1, "annotations": [], "data": {}}]'}, "this is Label Studio's own"),
        ({"a.json": '[{"image": "1.jpg", "annotations": []}]'}, r"COCO JSON \(instances\)$"),
        ({"a.json": "[[]]", "b.json": "3"}, "export the labels as COCO JSON$"),
    ],
)
def test_other_formats_are_named(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(BadAnnotationError, match=message) as error:
        read_folder(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", UNKNOWN)
def test_what_is_not_known_is_one_line(export, change, message):
    folder = export("roboflow")
    change(folder)
    with pytest.raises(BadAnnotationError, match=message) as error:
        read_folder(folder)
    assert "\n" not in str(error.value)


def classes_of(folder, key, share=0.2):
    """Return the class names of every object of a part, in the order of the file."""
    part = read_folder(folder, share).parts[key].coco
    names = {c["id"]: c["name"] for c in part["categories"]}
    return [names[a["category_id"]] for a in part["annotations"]]


def test_unused_group_is_left_out(export):
    """Roboflow's id 0; with objects it is a class."""
    folder = export("roboflow")
    read = read_folder(folder)
    assert [c["name"] for c in read.categories] == NAMES
    assert any("'ziffern'" in note for note in read.notes)
    edit(
        folder / "valid/_annotations.coco.json", lambda c: c["annotations"][0].update(category_id=0)
    )
    assert [c["name"] for c in read_folder(folder).categories] == ["ziffern", *NAMES]


def test_parts_with_other_ids_and_order(export):
    folder = export("coco")
    before = classes_of(folder, "val")

    def reverse(content):
        content["categories"] = [
            {"id": 100 - c["id"], "name": c["name"]} for c in content["categories"]
        ]
        for annotation in content["annotations"]:
            annotation["category_id"] = 100 - annotation["category_id"]

    edit(folder / "annotations/instances_val2017.json", reverse)
    read = read_folder(folder)
    assert [c["name"] for c in read.categories] == NAMES
    assert classes_of(folder, "val") == before
    assert not read.parts["train"].changed and read.parts["val"].changed


def test_class_that_only_the_other_part_has(export):
    folder = export("coco")

    def rename(content):
        content["categories"].append({"id": 77, "name": "kreis"})
        content["annotations"][0]["category_id"] = 77

    edit(folder / "annotations/instances_val2017.json", rename)
    prepared = prepare_folder(folder)
    assert prepared.class_names == [*NAMES, "kreis"]
    for name in register_prepared(prepared).values():
        DatasetCatalog.get(name)
        assert MetadataCatalog.get(name).thing_classes == [*NAMES, "kreis"]
    text = report(prepared, {}, 0.2)
    assert "'kreis' has objects in" in text and "no object to train on: class kreis" in text


def test_classes_of_a_checkpoint(export):
    """The order is the checkpoint's; the folder may lack some, but has no others."""
    folder = export("label_studio")
    order = ["acht", "fehlt", *NAMES[:8], "neun"]
    before = classes_of(folder, "all", None)
    read = read_folder(folder, None, order)
    assert read.parts.keys() == {"all"}
    assert [c["name"] for c in read.categories] == order
    part = read.parts["all"].coco
    names = {c["id"]: c["name"] for c in part["categories"]}
    assert [names[a["category_id"]] for a in part["annotations"]] == before
    with pytest.raises(BadAnnotationError, match="which the checkpoint does not know"):
        read_folder(folder, None, ["eins"])


def test_string_ids(export):
    folder = export("coco")
    before = classes_of(folder, "train")

    def as_text(content):
        for category in content["categories"]:
            category["id"] = f"c{category['id']}"
        for annotation in content["annotations"]:
            annotation["category_id"] = f"c{annotation['category_id']}"

    for part in ("train", "val"):
        edit(folder / f"annotations/instances_{part}2017.json", as_text)
    assert classes_of(folder, "train") == before


def test_names_of_datasets(exports, tmp_path):
    """Those of another dataset are not taken; another folder of the same name gets another."""
    first = register_folder(exports["coco"])
    assert first == {"train": "coco_train", "val": "coco_val"}
    assert register_folder(exports["coco"]) == first
    other = register_folder(shutil.copytree(exports["coco"], tmp_path / "coco"))
    assert not set(other.values()) & set(first.values())
    builtin = shutil.copytree(exports["coco"], tmp_path / "coco_2017")
    assert register_folder(builtin)["train"] != "coco_2017_train"
    strange = shutil.copytree(exports["coco"], tmp_path / "a b;d")
    assert register_folder(strange)["train"] == "a_b_d_train"
