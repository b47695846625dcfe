"""Finds the annotation files and the images of a folder that a labelling tool wrote.

| layout | annotations | images |
|---|---|---|
| Roboflow | `train/_annotations.coco.json`, also `valid/`, `test/` | beside the JSON file |
| COCO | `annotations/instances_train2017.json`, also `val2017` | `train2017/`, `images/train2017/` |
| CVAT, Datumaro | `annotations/instances_default.json`, or one of each subset | `images/`, `images/SUBSET/` |
| Label Studio | `result.json` | `images/` |
| JSON | one `*.json`, or `train.json` and `val.json` | beside it, `images/`, `train/`, `val/` |
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..coco_parsing import parse_file
from ..errors import BadAnnotationError

PART_NAMES = {  # part of a dataset: words by which files and folders name it
    "train": {"train", "training"},
    "val": {"val", "valid", "validation"},
    "test": {"test", "testing"},
}
WHOLE = "all"  # the part of a folder that is not divided
# Words by which folders of masks that are pictures are named.
MASK_NAMES = {"mask", "masks", "label", "labels", "gt", "groundtruth", "seg", "segmentation"}
MASK_NAMES |= {"annotation", "annotations", "segmentations"}
ROBOFLOW = "_annotations.coco.json"
# What other export formats leave in a folder.
_READ_BY_TOOLS = "which CVAT and Roboflow read and export as COCO JSON"
OTHER_FORMATS = {
    "*.yaml": f"YOLO, {_READ_BY_TOOLS}",
    "labels/*.txt": f"YOLO, {_READ_BY_TOOLS}",
    "*.xml": f"Pascal VOC or CVAT XML, {_READ_BY_TOOLS}",
    "*.csv": "CSV",
    "*.zip": "zip",
    "masks/*.png": "a mask as a picture, which CVAT reads and exports as COCO JSON",
}


class Part(NamedTuple):
    """One part of a labelled folder: an annotation file and the folders to look for its images."""

    json_file: Path
    image_roots: tuple[Path, ...]


class Layout(NamedTuple):
    """What was found in a labelled folder."""

    name: str
    folder: Path
    parts: dict[str, Part]  # keys of PART_NAMES; without subsets the one key WHOLE


def find_layout(path: str | Path, parse: Callable[[Path], Any] = parse_file) -> Layout:
    """Find the annotation files of a labelled folder.

    Args:
        path: the folder, or one COCO JSON file with its images beside it.
        parse: reads a JSON file.
    Raises:
        BadAnnotationError: if there is nothing known, or more than one thing, to train on.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() != ".json":
            formats = [format for pattern, format in OTHER_FORMATS.items() if path.match(pattern)]
            raise BadAnnotationError(
                f"{path} is {formats[0]}: export the labels as COCO JSON, and name the folder"
                if formats and formats != ["zip"]
                else f"{path} is neither a folder nor a JSON file: unpack an archive first, and name "
                "the folder with the annotations"
            )
        folder = path.parent.parent if _is_annotations(path.parent) else path.parent
        return Layout("JSON", folder, {WHOLE: Part(path, _image_roots(path, folder, None))})
    if not path.is_dir():
        raise BadAnnotationError(
            f"{path} does not exist: name the folder that the labelling tool wrote (--data FOLDER, "
            "which replaces DATASETS.FOLDER of a config file)"
        )

    found = {
        name: files
        for name, files in (
            ("Roboflow", _in_part_folders(path, parse)),
            ("COCO", sorted(_annotations(path).glob("instances_*.json"))),
            ("Label Studio", [f for f in [path / "result.json"] if f.is_file()]),
        )
        if files
    }
    if not found:
        files = _coco_files(_annotations(path), parse) or _coco_files(path, parse)
        found = {"JSON": files} if files else {}
    if not found:
        raise BadAnnotationError(
            f"{path} holds no annotations that are known: {_looked_for(path, parse)}"
        )
    if len(found) > 1:
        _refuse_several(path, [file for files in found.values() for file in files])
    ((name, files),) = found.items()
    parts = _by_part(path, files)
    if name == "COCO" and (path / "images").is_dir():
        name = "COCO (CVAT, Datumaro)"
    return Layout(
        name, path, {key: Part(file, _image_roots(file, path, key)) for key, file in parts.items()}
    )


def part_of(name: str) -> str | None:
    """Return the part that a file or folder is named after: instances_val2017 -> val."""
    return next((part for part, names in PART_NAMES.items() if _words(name) & names), None)


def holds_masks(path: str | Path, folder: str | Path) -> bool:
    """Return whether a folder within `folder` is named after masks that are pictures."""
    return bool(_words(os.path.relpath(path, folder)) & MASK_NAMES)


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _is_annotations(folder: Path) -> bool:
    return folder.name.lower() == "annotations"


def _annotations(folder: Path) -> Path:
    """Return the folder "annotations" in a folder, which may be written "Annotations"."""
    usual = folder / "annotations"
    if usual.is_dir():
        return usual
    return next((f for f in sorted(folder.iterdir()) if _is_annotations(f) and f.is_dir()), usual)


def _in_part_folders(folder: Path, parse: Callable[[Path], Any]) -> list[Path]:
    """Return the files of Roboflow's layout: one JSON file beside the images of each part."""
    files = []
    for part in sorted(folder.iterdir()):
        if part.is_dir() and part_of(part.name):
            own = part / ROBOFLOW
            files += [own] if own.is_file() else _coco_files(part, parse)
    return files


def _coco_files(folder: Path, parse: Callable[[Path], Any]) -> list[Path]:
    """Return the JSON files of a folder; if there are several, those of COCO's form."""
    files = sorted(file for file in folder.glob("*.json") if not file.name.startswith("."))
    return files if len(files) < 2 else [file for file in files if _is_coco(file, parse)]


def _is_coco(file: Path, parse: Callable[[Path], Any]) -> bool:
    try:
        content = parse(file)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def _by_part(folder: Path, files: Iterable[Path]) -> dict[str, Path]:
    """Return {part: file}. A file that names no part is the whole, or what the others leave to train."""
    parts: dict[str | None, list[Path]] = {}
    for file in files:
        name = file.stem
        if file.name == ROBOFLOW:
            name = "" if file.parent == folder else file.parent.name
        part = part_of(name) or (part_of(file.parent.name) if file.parent != folder else None)
        parts.setdefault(part, []).append(file)
    if "train" not in parts and None in parts:
        parts["train" if len(parts) > 1 else WHOLE] = parts.pop(None)
    for several in parts.values():
        if len(several) > 1:
            _refuse_several(folder, several)
    if None in parts:
        _refuse_several(folder, [*parts["train"], *parts[None]])
    return {part: parts[part][0] for part in (*PART_NAMES, WHOLE) if part in parts}


def _refuse_several(folder: Path, files: list[Path]) -> NoReturn:
    names = ", ".join(str(file.relative_to(folder)) for file in sorted(files)[:6])
    raise BadAnnotationError(
        f"{folder} holds several annotation files for the same images or part ({names}): name the one "
        "to use instead of the folder, or move the others away"
    )


def _looked_for(folder: Path, parse: Callable[[Path], Any]) -> str:
    text = (
        f"looked for train/{ROBOFLOW} (Roboflow), annotations/instances_*.json (COCO, CVAT), "
        "result.json (Label Studio) and *.json; export the labels as COCO JSON"
    )
    if other := _other_format(folder, [folder, _annotations(folder)], parse):
        return f"{text} ({other})"
    inner = [f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")]
    if len(inner) == 1 and any(inner[0].rglob("*.json")):
        return f"{text}, or name {inner[0]} if it is the export"
    other = _other_format(folder, sorted(inner), parse)  # as in train/ and valid/
    return f"{text} ({other})" if other else text


def _other_format(folder: Path, places: list[Path], parse: Callable[[Path], Any]) -> str:
    """Return what the first file of another format in some folders within `folder` is, or ""."""
    for pattern, format in OTHER_FORMATS.items():
        if found := [file for place in places for file in sorted(place.glob(pattern))]:
            return f"{found[0].relative_to(folder)} is {format}"
    for file in (file for place in places for file in sorted(place.glob("*.json"))[:1]):
        try:
            format = format_of_json(parse(file))
        except (OSError, ValueError, RecursionError):
            continue
        if format:
            return f"{file.relative_to(folder)} is {format}"
    return ""


def format_of_json(content: Any) -> str:
    """Return which tool's own format a JSON file has, and how that tool writes COCO JSON; "" if unknown."""
    first = content
    if isinstance(content, (list, dict)) and content:
        first = next(iter(content if isinstance(content, list) else content.values()))
    keys, of_first = (
        value.keys() if isinstance(value, dict) else set() for value in (content, first)
    )
    if {"shapes", "imagePath"} <= keys:
        return "LabelMe's own, which labelme2coco.py in LabelMe's examples makes COCO JSON of"
    if "_via_img_metadata" in keys or {"filename", "regions"} <= of_first:
        return "VIA's own: export its annotations in COCO format"
    if isinstance(content, list) and "data" in of_first:
        return "Label Studio's own: choose COCO when you export"
    return ""


def _image_roots(json_file: Path, folder: Path, part: str | None) -> tuple[Path, ...]:
    """Return the folders to look for images in, the likeliest first."""
    beside, subset = json_file.parent, json_file.stem.removeprefix("instances_")
    in_annotations = _is_annotations(beside)
    roots = [] if in_annotations else [beside]
    for base in (folder, folder / "images"):
        roots.append(base / subset)
        if part and base.is_dir():
            roots += sorted(f for f in base.iterdir() if f.is_dir() and part_of(f.name) == part)
    roots += [folder / "images", folder, beside]
    roots = [root for root in dict.fromkeys(roots) if root.is_dir()]
    return tuple(sorted(roots, key=lambda root: holds_masks(root, folder)))
