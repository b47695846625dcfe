"""What is wrong with a COCO file, found before the training instead of in its midst."""

import json
import math
import os
from collections import Counter
from typing import NamedTuple

SHOWN = 5  # problems named in a message
OUTSIDE = 1.0  # of the image's size that a polygon may reach beyond it
MAX_PIXELS = 2**31  # pycocotools counts in 32 bits


class BadAnnotationError(ValueError):
    """A COCO file that can't be used: one line with file, ids and what to do."""


class Problem(NamedTuple):
    """What is wrong with one entry, which can be left out."""

    key: str  # "images" or "annotations"
    id: int
    text: str

    def __str__(self):
        return self.text


def check_coco(json_file, image_root, skip=False, remedy='or set DATALOADER.BAD_INPUT to "skip"'):
    """Check a COCO instances file and that its images exist.

    Args:
        skip: return the problems of single images and annotations, for `clean_coco` to leave out; if
            False, they are errors too.
        remedy: what else to do about these than to correct the file.
    Returns:
        list of Problem.
    Raises:
        BadAnnotationError: if the file can't be used.
    """
    problems = list(_problems(_read(json_file), image_root))
    if problems and not skip:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise BadAnnotationError(
            f"{json_file}: {'; '.join(map(str, problems[:SHOWN]))}{more}. Correct the file, {remedy}"
        )
    return problems


def clean_coco(json_file, problems, copy):
    """Write to `copy` what a COCO file holds beside the entries with problems.

    Raises:
        BadAnnotationError: if no image is left.
    """
    with open(json_file, encoding="utf-8") as file:
        content = json.load(file)
    bad = {(problem.key, problem.id) for problem in problems}
    for key in ("images", "annotations"):
        content[key] = [entry for entry in content[key] if (key, entry["id"]) not in bad]
    if not content["images"]:
        raise BadAnnotationError(
            f"{json_file}: no image is left, the first is out because {problems[0]}"
        )
    with open(copy, "w", encoding="utf-8") as file:
        json.dump(content, file)


def _read(json_file):
    try:
        with open(json_file, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise BadAnnotationError(
            f"{json_file} can't be read as JSON ({error}): get it anew"
        ) from error
    for key, fields in (
        ("images", {"id", "file_name", "height", "width"}),
        ("annotations", {"id", "image_id", "category_id", "bbox"}),
        ("categories", {"id", "name"}),
    ):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise BadAnnotationError(
                f"{json_file} has no list {key!r}: is it a COCO instances file?"
            )
        for entry in entries:
            missing = fields - entry.keys() if isinstance(entry, dict) else fields
            if missing:
                raise BadAnnotationError(
                    f"{json_file}: {key} {entry.get('id') if isinstance(entry, dict) else entry!r} "
                    f"lacks {', '.join(sorted(missing))}: add it"
                )
            for field in fields & {"id", "image_id", "category_id"}:
                if type(entry[field]) is not int:
                    raise BadAnnotationError(
                        f"{json_file}: {key} {entry['id']!r} has {field} {entry[field]!r}, which is no "
                        "integer: correct it"
                    )
            if key == "categories" and not isinstance(entry["name"], str):
                raise BadAnnotationError(
                    f"{json_file}: categories {entry['id']} has the name {entry['name']!r}, which is no "
                    "text: correct it"
                )
        duplicates = [i for i, n in Counter(entry["id"] for entry in entries).items() if n > 1]
        if duplicates:
            raise BadAnnotationError(
                f"{json_file}: {key} with the same id {duplicates[:SHOWN]}: ids must be unique"
            )
    categories = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        if annotation["category_id"] not in categories:
            raise BadAnnotationError(
                f"{json_file}: annotation {annotation['id']} has the unknown category "
                f"{annotation['category_id']!r}: add it to categories, or remove the annotation"
            )
    return content


def _problems(content, image_root):
    images = {image["id"]: image for image in content["images"]}
    for image in images.values():
        name, file = f"image {image['id']}", image["file_name"]
        if not _has_size(image):
            text = f"{name} has height {image['height']!r}, width {image['width']!r}"
            yield Problem("images", image["id"], text)
        elif not isinstance(file, str) or not os.path.isfile(os.path.join(image_root, file)):
            yield Problem(
                "images", image["id"], f"{name}: no file {os.path.join(image_root, str(file))}"
            )
    for annotation in content["annotations"]:
        name, image = f"annotation {annotation['id']}", images.get(annotation["image_id"])
        if image is None:
            wrong = f"{name} belongs to image {annotation['image_id']!r}, which is not there"
        elif not _has_size(image):
            continue  # it goes with its image
        else:
            wrong = (
                _box_problem(annotation["bbox"], image)
                or _mask_problem(annotation, image)
                or _other_problem(annotation)
            )
            wrong = wrong and f"{name} (image {image['id']}) has {wrong}"
        if wrong:
            yield Problem("annotations", annotation["id"], wrong)


def _has_size(image):
    size = image["height"], image["width"]
    return all(type(n) is int and n > 0 for n in size) and math.prod(size) < MAX_PIXELS


def _numbers(values, limit=1e9):
    """Whether all are numbers within the limit, which NaN is not."""
    return all(type(v) in (int, float) and -limit <= v <= limit for v in values)


def _box_problem(box, image):
    if not isinstance(box, list) or len(box) != 4 or not _numbers(box):
        return f"bbox {box!r:.80}, not four numbers within 1e9"
    x, y, width, height = box
    # A part outside is common, from rounding, and clipped by Detectron2.
    if (
        width < 0
        or height < 0
        or x >= image["width"]
        or y >= image["height"]
        or (x + width < 0 or y + height < 0)
    ):
        return f"bbox {box} outside of the image, {image['width']} wide and {image['height']} high"


def _other_problem(annotation):
    points = annotation.get("keypoints") or []
    if not isinstance(points, list) or len(points) % 3 or not _numbers(points):
        return "keypoints that are not three numbers each"
    for name, values in (("iscrowd", (0, 1)), ("ignore", (0,))):
        value = annotation.get(name, 0)
        if type(value) not in (int, bool) or value not in values:
            return f"{name} {value!r:.80}, not {' or '.join(map(str, values))}"
    return None


def _mask_problem(annotation, image):
    masks, size = annotation.get("segmentation"), [image["height"], image["width"]]
    if masks is None:
        return None  # boxes only
    if isinstance(masks, dict):
        counts = masks.get("counts")
        if masks.get("size") != size:
            return f"an RLE of size {masks.get('size')!r:.80}, not the image's {size}"
        if isinstance(counts, list):
            if not all(type(n) is int and n >= 0 for n in counts) or sum(counts) != math.prod(size):
                return "an RLE whose counts do not add up to the image"
        elif not isinstance(counts, str) or _decoded_length(counts) != math.prod(size):
            return "an RLE whose counts do not add up to the image"
        return None
    if not isinstance(masks, list) or not masks:
        return "no polygon"
    for polygon in masks:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return "a polygon that is not three points or more"
        if not _numbers(polygon):
            return "a polygon with coordinates that are no finite numbers"
        # pycocotools reserves memory for the way from point to point.
        margins = [OUTSIDE * n for n in size]
        for start, length, margin in zip((1, 0), size, margins, strict=True):
            values = polygon[start::2]
            if min(values) < -margin or max(values) > length + margin:
                return "a polygon far outside of the image"
    return None


def _decoded_length(counts):
    """Return the number of pixels that COCO's compressed counts cover, or None if they are damaged.

    Read here, because pycocotools writes out of bounds when it decodes counts that are too long.
    """
    runs, position = [], 0
    while position < len(counts):
        value = shift = 0
        more = True
        while more:
            if position >= len(counts):
                return None
            digit = ord(counts[position]) - 48
            if not 0 <= digit < 64 or shift > 30:
                return None
            value |= (digit & 31) << shift
            more = bool(digit & 32)
            position, shift = position + 1, shift + 5
            if not more and digit & 16:
                value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if value < 0:
            return None
        runs.append(value)
    return sum(runs)
