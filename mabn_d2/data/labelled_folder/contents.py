"""Reads a labelled folder: one list of classes for all parts, images found, a part to validate on."""

import filecmp
import functools
import hashlib
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..coco_parsing import parse_file
from ..errors import BadAnnotationError
from .categories import unify_categories
from .image_files import ImageFinder
from .layouts import WHOLE, Layout, Part, find_layout, format_of_json, holds_masks
from .normalize import normalize


class Contents(NamedTuple):
    """One part: its COCO content, with file names that lead from `image_root` to the images."""

    json_file: Path  # that it was read from
    image_root: Path
    coco: dict[str, Any]
    changed: bool  # False: `json_file` has the same content


class LabelledFolder(NamedTuple):
    """What a labelled folder holds."""

    layout: Layout
    categories: list[dict[str, Any]]  # COCO's, the same in all parts, ids rising
    parts: dict[str, Contents]  # "train", "val", "test"; "all" if it is not divided
    held_out: bool  # whether "val" was taken from the images to train on
    notes: list[str]  # what was left out or is doubtful, one line each
    images: str  # digest of the paths of all images in the folder, which it keeps when it is moved


def read_folder(
    path: str | Path, val_share: float | None = 0.2, class_names: list[str] | None = None
) -> LabelledFolder:
    """Read a labelled folder.

    Args:
        path: the folder, or one COCO JSON file.
        val_share: share of the images that becomes "val" if the folder has no such part. A hash of
            their names decides which: an image stays in its part when others are added. None: for
            evaluation, parts stay as they are, and none to train on is needed.
        class_names: names that the classes have to have, in this order; a folder may lack some.
    Raises:
        BadAnnotationError: if the folder can't be used; one line.
    """
    parse = functools.cache(parse_file)  # the layout and the content need the same files
    layout = find_layout(path, parse)
    files = {key: part.json_file for key, part in layout.parts.items()}
    if val_share is not None and not {"train", WHOLE} & files.keys():
        raise BadAnnotationError(
            f"{path} has no part to train on, only {', '.join(map(str, files.values()))}: add a "
            "part named train, or name the file to train on instead of the folder"
        )
    coco = {key: read_coco(file, parse) for key, file in files.items()}
    rewritten = {key for key, file in files.items() if normalize(coco[key]) | _is_encoded(file)}
    categories, changed, notes = unify_categories(files, coco, class_names)
    changed |= rewritten
    parts = {
        key: _with_images(layout, key, content, key in changed, notes)
        for key, content in coco.items()
    }
    digest = hashlib.sha256()
    for name in sorted(
        unicodedata.normalize("NFC", _path_in_folder(part, image, layout.folder))
        for part in parts.values()
        for image in part.coco["images"]
    ):
        digest.update(name.encode(errors="surrogatepass") + b"\0")
    held_out = False
    if val_share is not None and "val" not in parts:
        held_out = True
        whole = parts.pop("train" if "train" in parts else WHOLE)
        train, val = _split(whole, val_share, layout.folder)
        parts = {"train": train, "val": val, **parts}
    return LabelledFolder(layout, categories, parts, held_out, notes, digest.hexdigest())


def read_coco(json_file: str | Path, parse: Callable[[Path], Any] = parse_file) -> dict[str, Any]:
    """Return the content of a COCO file: a dict with three lists of dicts, more is not checked.

    Args:
        json_file: path of the file.
        parse: reads a JSON file.
    Raises:
        BadAnnotationError: if it is none.
    """
    try:
        content = parse(Path(json_file))
    except (OSError, ValueError, RecursionError) as error:
        raise BadAnnotationError(
            f"{json_file} can't be read as JSON ({error}): export it again"
        ) from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            other = format_of_json(content)
            raise BadAnnotationError(
                f"{json_file} has no list {key!r} of COCO entries: export the labels as COCO JSON "
                f"(instances){f'; this is {other}' if other else ''}"
            )
    return content


def _is_encoded(json_file: str | Path) -> bool:
    """Return whether a JSON file is not plain UTF-8, which not every reader knows."""
    with open(json_file, "rb") as file:
        return json.detect_encoding(file.read(4)) != "utf-8"


def image_hash(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone, not on machine or process.

    Roboflow's augmented copies of an image, NAME.rf.HASH.jpg, have the same number.
    """
    text = unicodedata.normalize("NFC", name.replace("\\", "/"))
    text = re.sub(r"\.rf\.\w+(?=\.\w+$)", "", text)
    return (
        int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big")
        / 2**64
    )


def _with_images(
    layout: Layout, key: str, coco: dict[str, Any], changed: bool, notes: list[str]
) -> Contents:
    """Return the Contents of a part, whose file names become such that lead to the images.

    Args:
        notes: gets a line where it is doubtful that they do.
    """
    part = layout.parts[key]
    images = coco["images"]
    for image in images:
        if not isinstance(image.get("file_name"), str):
            raise BadAnnotationError(
                f"{part.json_file}: image {image.get('id')!r} has the file_name "
                f"{image.get('file_name')!r:.80}: give it the name of its file"
            )
    root = _common_root(part, layout.folder, [image["file_name"] for image in images])
    if root is not None:
        paths = [os.path.normpath(os.path.join(root, image["file_name"])) for image in images]
        _refuse_shared(part.json_file, zip(images, paths, strict=True))
        return Contents(part.json_file, root, coco, changed)

    finder = ImageFinder(part.image_roots, layout.folder, key)
    found = [(image, finder.find(image["file_name"])) for image in images]
    _refuse_shared(part.json_file, ((i, os.path.realpath(path)) for i, path in found if path))
    missing = [image["file_name"] for image, path in found if path is None]
    for image, path in found:
        if path is None:  # where a message says that it was looked for
            path = os.path.join(part.image_roots[0], image["file_name"])
        relative = os.path.relpath(path, layout.folder)
        image["file_name"] = os.path.abspath(path) if relative.startswith("..") else relative
    if finder.by_name:
        name, path = finder.by_name[0]
        notes.append(
            f"{len(finder.by_name)} images of {part.json_file} are in another folder than it says, and "
            f"were found by their name: {name!r} is {path}"
        )
    if images and len(missing) == len(images):
        if finder.several:
            raise BadAnnotationError(
                f"{part.json_file} names the image {missing[0]!r}, and {len(finder.several[0])} files "
                f"have this name ({', '.join(sorted(finder.several[0])[:3])}): move those away that "
                "are not the labelled images"
            )
        folders = ", ".join(map(str, part.image_roots))
        raise BadAnnotationError(
            f"{part.json_file} names {len(images)} images, {missing[0]!r} for one, and none of them "
            f"is in {folders}: export with images, or copy them there"
        )
    return Contents(part.json_file, layout.folder, coco, True)


def _common_root(part: Part, folder: Path, names: list[str]) -> Path | None:
    """Return the folder that holds all images of a part by their names, or None."""
    if not names:
        return None
    roots = [
        root
        for root in part.image_roots
        if all(os.path.isfile(os.path.join(root, name)) for name in names)
    ]
    for other in roots[1:]:
        if holds_masks(other, folder) and not holds_masks(roots[0], folder):
            continue
        one, two = (os.path.join(root, names[0]) for root in (roots[0], other))
        if not (os.path.samefile(one, two) or filecmp.cmp(one, two, shallow=False)):
            raise BadAnnotationError(
                f"{part.json_file} names {names[0]!r} and other images that are both in {roots[0]} and in "
                f"{other}, with other content: move those away that are not the labelled images"
            )
    return roots[0] if roots else None


def _refuse_shared(json_file: Path, images: Iterable[tuple[dict[str, Any], str]]) -> None:
    """Refuse two entries for one image, each of which would have a part of its objects.

    Args:
        images: (entry, path) of each image.
    """
    entry_of: dict[str, dict[str, Any]] = {}
    for image, path in images:
        other = entry_of.setdefault(path, image)
        if other is not image:
            raise BadAnnotationError(
                f"{json_file}: {other['file_name']!r} (id {other.get('id')!r}) and "
                f"{image['file_name']!r} (id {image.get('id')!r}) would both be the image {path}: copy "
                "the images with their folders, or merge the two entries"
            )


def _path_in_folder(contents: Contents, image: dict[str, Any], folder: Path) -> str:
    path = os.path.join(contents.image_root, image["file_name"])
    return os.path.relpath(path, folder).replace("\\", "/")


def _split(contents: Contents, share: float, folder: Path) -> list[Contents]:
    """Return (train, val): images whose hash is below `share` validate, at least one of either.

    Both parts have at least one image with objects. The hash is of the path of the image in `folder`,
    which other images do not change.
    """
    coco = contents.coco
    for key in ("images", "annotations"):
        # Each part alone would not show that its objects are those of two images.
        repeated = [i for i, n in Counter(str(e.get("id")) for e in coco[key]).items() if n > 1]
        if repeated:
            raise BadAnnotationError(
                f"{contents.json_file}: {key} with the same id {', '.join(repeated[:5])}: ids must be "
                "unique"
            )
    hashes = {
        id(image): image_hash(_path_in_folder(contents, image, folder)) for image in coco["images"]
    }
    labelled = {str(annotation.get("image_id")) for annotation in coco["annotations"]}
    with_objects = sorted(
        (image for image in coco["images"] if str(image.get("id")) in labelled),
        key=lambda image: hashes[id(image)],
    )
    if len(with_objects) < 2:
        raise BadAnnotationError(
            f"{contents.json_file} has {len(with_objects)} image(s) with objects, and no part to "
            "validate on: at least two are needed, one of which is held out"
        )
    lowest, highest = (hashes[id(with_objects[k])] for k in (0, -1))
    limit = min(max(share, math.nextafter(lowest, 1)), highest)
    val = {id(image) for image in coco["images"] if hashes[id(image)] < limit}
    parts = []
    for in_val in (False, True):
        images = [image for image in coco["images"] if (id(image) in val) is in_val]
        ids = {_hashable(image.get("id")) for image in images}
        annotations = [a for a in coco["annotations"] if _hashable(a.get("image_id")) in ids]
        part = {**coco, "images": images, "annotations": annotations}
        parts.append(contents._replace(coco=part, changed=True))
    lost = len(coco["annotations"]) - sum(len(part.coco["annotations"]) for part in parts)
    if lost:
        # They belong to no image: kept for the check of the annotation file to name.
        known = {_hashable(image.get("id")) for image in coco["images"]}
        parts[0].coco["annotations"] += [
            a for a in coco["annotations"] if _hashable(a.get("image_id")) not in known
        ]
    return parts


def _hashable(value: Any) -> int | str:
    return value if isinstance(value, (int, str)) else repr(value)
