"""Labelled folders whose entries are doubtful: the image of another part, two entries for one image."""

import errno
import json
import os
import shutil
import tempfile

import pytest
from PIL import Image

from exports import edit, write_export
from mabn_d2.data.errors import BadAnnotationError, DataError
from mabn_d2.data.labelled_folder import mask_kind, prepare_folder, read_folder
from mabn_d2.data.labelled_folder.contents import image_hash
from mabn_d2.data.labelled_folder.image_files import image_files


def annotations(folder, part="train"):
    return folder / part / "_annotations.coco.json"


def test_missing_image_is_not_taken_from_another_part(tmp_path):
    """Both parts number their images; the message says where the missing one was looked for."""
    folder = write_export(tmp_path / "e", "roboflow", sizes=(4, 4))
    (folder / "train/2_jpg.rf.0a1b.jpg").unlink()
    names = [image["file_name"] for image in read_folder(folder).parts["train"].coco["images"]]
    assert names == [f"train/{i}_jpg.rf.0a1b.jpg" for i in range(4)]


def test_equal_names_in_folders_of_the_parts(tmp_path):
    """FiftyOne's layout of each part: labels.json and data/."""
    folder = write_export(tmp_path / "e", "roboflow", sizes=(4, 3))
    for part in ("train", "valid"):
        annotations(folder, part).rename(folder / part / "labels.json")
        (folder / part / "data").mkdir()
        for image in (folder / part).glob("*.jpg"):
            image.rename(folder / part / "data" / image.name)
    parts = read_folder(folder).parts
    for key, count in (("train", 4), ("val", 3)):
        names = [image["file_name"] for image in parts[key].coco["images"]]
        assert len(names) == count
        assert all(os.path.isfile(parts[key].image_root / name) for name in names)
        assert all(("valid" in name) == (key == "val") for name in names)


@pytest.mark.parametrize("spelling", ["{}", "./{}", "x/../{}"])
def test_two_entries_for_one_image(tmp_path, spelling):
    folder = write_export(tmp_path / "e", "roboflow")
    (folder / "train/x").mkdir()

    def repeat(content):
        image = content["images"][0]
        name = spelling.format(image["file_name"])
        content["images"].append({**image, "id": 99, "file_name": name})

    edit(annotations(folder), repeat)
    with pytest.raises(
        BadAnnotationError, match=r"\(id 0\) and .* \(id 99\) would both be the image"
    ):
        read_folder(folder)


@pytest.mark.parametrize("layout, file", [("roboflow", "train/_annotations.coco.json"),
                                          ("label_studio", "result.json")])  # fmt: skip
def test_ids_that_are_whole_floats(tmp_path, layout, file):
    """As pandas writes them: the same as whole numbers."""
    folder = write_export(tmp_path / "e", layout)
    before = prepare_folder(folder)

    def as_floats(content):
        for key in ("images", "annotations", "categories"):
            for entry in content[key][::2]:
                for name in {"id", "image_id", "category_id"} & entry.keys():
                    entry[name] = float(entry[name])

    edit(folder / file, as_floats)
    after = prepare_folder(folder)
    assert after.summaries == before.summaries and after.classes == before.classes
    with open(after.parts["train"].json_file) as copy:
        assert all(type(a["image_id"]) is int for a in json.load(copy)["annotations"])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings(tmp_path, encoding):
    """The copy that Detectron2 reads is plain UTF-8."""
    folder = write_export(tmp_path / "e", "roboflow")
    before = prepare_folder(folder)
    file = annotations(folder)
    file.write_text(file.read_text(encoding="utf-8"), encoding=encoding)
    after = prepare_folder(folder)
    assert after.summaries == before.summaries and after.classes == before.classes
    with open(after.parts["train"].json_file, encoding="utf-8") as copy:
        assert len(json.load(copy)["images"]) == 12


def test_links_to_folders(tmp_path):
    """Images behind one are found, once, also if a link leads back."""
    folder = write_export(tmp_path / "e", "json")
    (tmp_path / "disk").mkdir()
    for image in folder.glob("*.jpg"):
        image.rename(tmp_path / "disk" / image.name)
    (folder / "photos").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/back").symlink_to(tmp_path / "disk")
    assert sum(len(part.coco["images"]) for part in read_folder(folder).parts.values()) == 16
    assert len(list(image_files(folder))) == 16


def test_copies_of_one_image_stay_together(tmp_path):
    """Roboflow's augmented copies, if there is no part to validate on."""
    hashes = {image_hash(f"a/photo_jpg.rf.{n:032x}.jpg") for n in range(9)}
    assert hashes == {image_hash("a/photo_jpg.jpg")} != {image_hash("a/photo_png.jpg")}


@pytest.mark.parametrize("masks", [[[]], [[1.0, 2.0, 9.0, 8.0]]])
def test_polygons_without_area_everywhere(tmp_path, masks):
    """Boxes are trained; if some objects only have such polygons, masks are."""
    folder = write_export(tmp_path / "e", "json")
    edit(folder / "labels.json", lambda c: c["annotations"][0].update(segmentation=masks))
    assert mask_kind(prepare_folder(folder).summaries) == "polygon"
    edit(folder / "labels.json", lambda c: [a.update(segmentation=masks) for a in c["annotations"]])
    assert mask_kind(prepare_folder(folder).summaries) is None


def test_class_name_that_cannot_be_written(tmp_path):
    folder = write_export(tmp_path / "e", "json")
    edit(folder / "labels.json", lambda c: c["categories"][0].update(name="\ud83d"))
    with pytest.raises(BadAnnotationError, match="give it an integer and a text"):
        read_folder(folder)


def test_no_room_for_a_copy(tmp_path, monkeypatch):
    """A full disk under TMPDIR is one line."""
    folder = write_export(tmp_path / "e", "json")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(DataError, match="No space left on device.: free space .* set TMPDIR"):
        prepare_folder(folder)


def held_out(folder, share=0.2):
    """Return the names of the images that are held out, without their folders."""
    images = read_folder(folder, share).parts["val"].coco["images"]
    return {os.path.basename(image["file_name"]) for image in images}


def test_images_stay_in_their_part_when_others_need_a_search(tmp_path):
    """One name that is not where the file says makes all names be searched."""
    folder = write_export(tmp_path / "e", "cvat", sizes=(30, 0))
    before = held_out(folder)
    json_file = folder / "annotations/instances_default.json"
    (folder / "images/day 2").mkdir()
    shutil.copy(folder / "images/site 0/photo 0.png", folder / "images/day 2/new.png")

    def add(content):
        content["images"].append({**content["images"][0], "id": 99, "file_name": "new.png"})

    edit(json_file, add)
    assert held_out(folder) - {"new.png"} == before


def test_repeated_ids_are_seen_before_the_split(tmp_path):
    """Each part alone would have unique ids, and the objects of both images."""
    folder = write_export(tmp_path / "e", "json")
    edit(folder / "labels.json", lambda c: c["images"][1].update(id=c["images"][0]["id"]))
    with pytest.raises(BadAnnotationError, match="images with the same id 1: ids must be unique"):
        read_folder(folder)


@pytest.mark.parametrize("masks", ["labels", "masks", "images/gt"])
def test_masks_that_are_pictures_are_not_the_images(tmp_path, masks):
    folder = write_export(tmp_path / "e", "json", sizes=(4, 0))
    for image in folder.glob("*.jpg"):
        for name in ("images", masks):
            (folder / name).mkdir(exist_ok=True, parents=True)
            Image.new("RGB", (96, 96)).save(folder / name / image.name)
        image.rename(folder / "images" / image.name)
    if masks != "images/gt":
        (folder / "labels.json").rename(folder / f"{masks}.json")
    for part in read_folder(folder).parts.values():
        for image in part.coco["images"]:
            path = os.path.join(part.image_root, image["file_name"])
            assert os.path.dirname(path) == str(folder / "images")


@pytest.mark.parametrize("folders", [("raw", "processed"), ("images", "photos/images")])
def test_images_that_are_there_twice(tmp_path, folders):
    """With the same content either is right; otherwise the user decides."""
    folder = write_export(tmp_path / "e", "json", sizes=(4, 0))
    for image in folder.glob("*.jpg"):
        for name in folders:
            (folder / name).mkdir(exist_ok=True, parents=True)
            shutil.copy(image, folder / name)
        image.unlink()
    if "images" in folders:
        read_folder(folder)
    for image in (folder / folders[1]).glob("*.jpg"):
        Image.new("RGB", (96, 96)).save(image)
    if "images" not in folders:
        with pytest.raises(BadAnnotationError, match="2 files have this name .*move those away"):
            read_folder(folder)


def test_two_folders_with_all_images(tmp_path):
    folder = write_export(tmp_path / "e", "cvat", sizes=(4, 0))
    shutil.copytree(folder / "images", folder / "default")
    read_folder(folder)  # copies
    for image in (folder / "default").rglob("*.png"):
        Image.new("RGB", (96, 96)).save(image)
    with pytest.raises(BadAnnotationError, match="both in .*default and in .*images, with other"):
        read_folder(folder)


def test_image_of_another_folder_is_noted(tmp_path):
    folder = write_export(tmp_path / "e", "cvat", sizes=(4, 0))
    (folder / "images/site 1").rename(folder / "images/site 2")
    (note,) = (n for n in read_folder(folder).notes if "found by their name" in n)
    assert note.startswith("2 images of") and "'site 1/photo 1.png' is" in note


@pytest.mark.parametrize("name", [None, 5])
def test_image_without_a_name(tmp_path, name):
    folder = write_export(tmp_path / "e", "json")
    edit(folder / "labels.json", lambda c: c["images"][3].update(file_name=name))
    with pytest.raises(BadAnnotationError, match=f"image 4 has the file_name {name}: give it"):
        read_folder(folder)


def test_folder_that_is_named_like_a_part(tmp_path):
    folder = write_export(tmp_path / "e", "json")
    (folder / "labels.json").rename(folder / "_annotations.coco.json")
    assert read_folder(folder.rename(tmp_path / "crash-test")).parts.keys() == {"train", "val"}


def test_references_as_text_and_polygons_without_a_list(tmp_path):
    """VIA: "image_id": "1" for the image 1, "segmentation": [x, y, ...]."""
    folder = write_export(tmp_path / "e", "json")
    before = prepare_folder(folder)

    def as_via(content):
        for annotation in content["annotations"]:
            annotation["image_id"] = str(annotation["image_id"])
            if len(annotation["segmentation"]) == 1:
                (annotation["segmentation"],) = annotation["segmentation"]

    edit(folder / "labels.json", as_via)
    after = prepare_folder(folder)
    assert after.summaries == before.summaries and mask_kind(after.summaries) == "polygon"
