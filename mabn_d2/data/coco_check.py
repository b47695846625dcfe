"""Checks a COCO file before the training."""

import logging
import math
import os
from collections import Counter
from typing import Any

from .coco_annotations import AnnotationCheck
from .coco_findings import SHOWN, Edit, Findings, Problem, apply_edits, refuse
from .coco_images import Sizes, inspect_images
from .coco_parsing import is_text, read_json
from .dataset_summary import DatasetSummary
from .errors import BadAnnotationError

__all__ = ["Edit", "apply_edits", "check_coco", "inspect"]

FIELDS = {
    "images": {"id", "file_name", "height", "width"},
    "annotations": {"id", "image_id", "category_id", "bbox"},
    "categories": {"id", "name"},
}


def check_coco(
    json_file: str,
    image_root: str,
    skip: bool = False,
    remedy: str = 'or set DATALOADER.BAD_INPUT to "skip"',
    masks: bool = True,
    evaluation: bool = False,
) -> list[Problem]:
    """Check a COCO instances file and that its images exist.

    Args:
        skip: return the problems of single images and annotations, to be left out; if False, they
            are errors too.
        remedy: what else to do about these than to correct the file.
        masks: whether the segmentations are used.
        evaluation: whether the file is used for evaluation.
    Raises:
        BadAnnotationError: if the file can't be used.
    """
    content = read_json(json_file)
    findings = inspect(content, json_file, image_root, masks=masks, evaluation=evaluation)
    for note in findings.notes:
        logging.getLogger(__name__).warning(f"{json_file}: {note}")
    if not skip:
        refuse(findings.problems, json_file, remedy)
    return findings.problems


def inspect(
    content: Any, json_file: str, image_root: str, *, masks: bool = True, evaluation: bool = False
) -> Findings:
    """Look at all of a parsed COCO file.

    Args:
        content: what the JSON file holds; it is not changed.
        json_file: its path, for messages.
        image_root: folder of the images.
        masks: whether the segmentations are used; if not, a bad one is no problem.
        evaluation: whether the file is used for evaluation, where nothing may be left out and
            `area` and `iscrowd` are needed.
    Raises:
        BadAnnotationError: if the file as a whole can't be used.
    """
    if isinstance(content, dict) and evaluation and "annotations" not in content:
        content = {**content, "annotations": []}  # COCO's test sets
        annotated = False
    else:
        annotated = True
    _check_structure(content, json_file)
    findings = Findings(DatasetSummary(json_file, annotated=annotated))
    findings.summary.classes = [
        c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])
    ]
    findings.summary.images = len(content["images"])
    files = [
        os.path.normpath(os.path.join(image_root, str(i["file_name"]))) for i in content["images"]
    ]
    findings.summary.files = set(files)
    sizes = inspect_images(content["images"], json_file, image_root, findings, evaluation)
    if len(findings.summary.files) < len(files):
        _find_shared(content, files, sizes, findings)
    AnnotationCheck(content, sizes, findings, masks, evaluation).inspect()
    _note_classes(content, findings)
    return findings


def _check_structure(content: Any, json_file: str) -> None:
    """The lists are there, their entries have all fields, and ids are unique and of one type."""
    for key, fields in FIELDS.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise BadAnnotationError(
                f"{json_file} has no list {key!r}: is it a COCO instances file?"
            )
        if not all(isinstance(entry, dict) for entry in entries):
            (bad, *_) = [entry for entry in entries if not isinstance(entry, dict)]
            raise BadAnnotationError(f"{json_file}: {key} holds {bad!r:.80}, no object: correct it")
        if any(not fields.issubset(keys) for keys in Counter(map(tuple, entries))):
            (bad, *_) = [entry for entry in entries if not fields <= entry.keys()]
            missing = ", ".join(sorted(fields - bad.keys()))
            raise BadAnnotationError(
                f"{json_file}: {key} {bad.get('id')!r:.80} lacks {missing}: add it"
            )
        for name in sorted(fields & {"id", "image_id", "category_id"}):
            _check_ids(entries, key, name, json_file)
        ids = [entry["id"] for entry in entries]
        # Detectron2 exempts the files of this name, which COCO's 2014 split has: they repeat ids.
        if len(set(ids)) < len(ids) and not (key == "annotations" and "minival" in json_file):
            repeated = [i for i, n in Counter(ids).items() if n > 1]
            raise BadAnnotationError(
                f"{json_file}: {key} with the same id {repeated[:SHOWN]!r:.200}: ids must be unique"
            )
    for category in content["categories"]:
        if not is_text(category["name"]):
            raise BadAnnotationError(
                f"{json_file}: categories {category['id']!r} has the name {category['name']!r:.80}, "
                "which is no text: correct it"
            )
    categories = {category["id"] for category in content["categories"]}
    unknown = {a["category_id"] for a in content["annotations"]} - categories
    if unknown:
        bad = next(a for a in content["annotations"] if a["category_id"] in unknown)
        raise BadAnnotationError(
            f"{json_file}: annotation {bad['id']!r} has the unknown category "
            f"{bad['category_id']!r}: add it to categories, or remove the annotation"
        )


def _check_ids(entries: list[dict], key: str, name: str, json_file: str) -> None:
    """Ids are whole numbers, or all of them are text."""
    values = [entry[name] for entry in entries]
    types = Counter(map(type, values))
    if types.keys() <= {int} or types.keys() <= {str}:
        return
    if types.keys() <= {int, float} and all(math.isfinite(v) and v == int(v) for v in values):
        return
    common = int if types[int] >= types[str] else str
    bad = next(
        entry
        for entry in entries
        if type(entry[name]) is not common
        and not (type(entry[name]) is float and common is int and entry[name].is_integer())
    )
    kind = "integer, as the others are" if common is int else "text, as the others are"
    raise BadAnnotationError(
        f"{json_file}: {key} {bad['id']!r:.80} has {name} {bad[name]!r:.80}, which is no {kind}: "
        "correct it"
    )


def _find_shared(content: dict, files: list[str], sizes: Sizes, findings: Findings) -> None:
    """Add entries that share an image and each have a part of its objects: the rest is background to both.

    Entries that have the same objects only count the image more often.
    """
    positions: dict[str, list[int]] = {}
    for position, file in enumerate(files):
        if sizes.heights[position]:
            positions.setdefault(file, []).append(position)
    groups = [group for group in positions.values() if len(group) > 1]
    ids = [image["id"] for image in content["images"]]
    objects: dict[Any, list[str]] = {ids[position]: [] for group in groups for position in group}
    for annotation in content["annotations"]:
        if (found := objects.get(annotation["image_id"])) is not None:
            found.append(repr((annotation["category_id"], annotation["bbox"])))
    for group in groups:
        if all(sorted(objects[ids[p]]) == sorted(objects[ids[group[0]]]) for p in group):
            continue
        for position in group:
            other = ids[group[position == group[0]]]
            findings.problems.append(
                Problem(
                    "images",
                    ids[position],
                    f"image {ids[position]}: {files[position]} is also image {other}, with other objects: "
                    "merge the two entries",
                    position,
                )
            )


def _note_classes(content: dict, findings: Findings) -> None:
    names = Counter(findings.summary.classes)
    if repeated := [name for name, count in names.items() if count > 1]:
        findings.notes.append(
            f"{len(repeated)} class names are there more than once: {', '.join(repeated[:SHOWN])}; "
            "each is trained as a class of its own"
        )
    used = Counter(annotation["category_id"] for annotation in content["annotations"])
    for category in content["categories"]:
        if category["name"].strip("_").lower() == "background":
            findings.notes.append(
                f"class {category['name']!r} has {used[category['id']]} annotations and is trained "
                "as any other: Detectron2 needs no class for the background"
            )
