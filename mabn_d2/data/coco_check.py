"""What is wrong with a COCO file, found before the training instead of in its midst."""

import json
import math
import os
from collections import Counter

SHOWN = 5  # problems named in a message


class BadAnnotationError(ValueError):
    """A COCO file that can't be used: one line with file, ids and what to do."""


def check_coco(json_file, image_root, skip=False):
    """Check a COCO instances file and that its images exist.

    Args:
        skip: return the problems that concern single images and annotations, which Detectron2 or the
            loader then leave out; if False, they are errors too.
    Returns:
        list of str, the problems.
    Raises:
        BadAnnotationError: if the file can't be used.
    """
    problems = list(_problems(_read(json_file), image_root))
    if problems and not skip:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise BadAnnotationError(
            f"{json_file}: {'; '.join(problems[:SHOWN])}{more}. Correct the file, or set "
            'DATALOADER.BAD_INPUT to "skip"'
        )
    return problems


def _read(json_file):
    try:
        with open(json_file, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise BadAnnotationError(f"{json_file} can't be read as JSON ({error}): get it anew") from error
    for key, fields in (
        ("images", {"id", "file_name", "height", "width"}),
        ("annotations", {"id", "image_id", "category_id", "bbox"}),
        ("categories", {"id", "name"}),
    ):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise BadAnnotationError(f"{json_file} has no list {key!r}: is it a COCO instances file?")
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
        if not _is_size(image["height"]) or not _is_size(image["width"]):
            yield f"image {image['id']} has height {image['height']!r}, width {image['width']!r}"
        elif not os.path.isfile(os.path.join(image_root, str(image["file_name"]))):
            yield f"image {image['id']}: no file {os.path.join(image_root, str(image['file_name']))}"
    for annotation in content["annotations"]:
        name, image = f"annotation {annotation['id']}", images.get(annotation["image_id"])
        if image is None:
            yield f"{name} belongs to image {annotation['image_id']!r}, which is not there"
        elif _is_size(image["height"]) and _is_size(image["width"]):
            wrong = _box_problem(annotation["bbox"], image) or _mask_problem(annotation, image)
            if wrong:
                yield f"{name} (image {image['id']}) has {wrong}"


def _is_size(value):
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _numbers(values):
    return all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )


def _box_problem(box, image):
    if not isinstance(box, list) or len(box) != 4 or not _numbers(box):
        return f"bbox {box!r}, not four numbers"
    x, y, width, height = box
    # A part outside is common, from rounding, and clipped by Detectron2.
    if width < 0 or height < 0 or x >= image["width"] or y >= image["height"] or (
        x + width < 0 or y + height < 0
    ):
        return f"bbox {box} outside of the image, {image['width']} wide and {image['height']} high"


def _mask_problem(annotation, image):
    masks = annotation.get("segmentation")
    if masks is None:
        return None  # boxes only
    size = [image["height"], image["width"]]
    if isinstance(masks, dict):
        counts = masks.get("counts")
        if masks.get("size") != size:
            return f"an RLE of size {masks.get('size')}, not the image's {size}"
        if isinstance(counts, list):
            if not all(isinstance(n, int) and n >= 0 for n in counts) or sum(counts) != math.prod(size):
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
