"""Counts of what a labelled folder holds."""

from collections import Counter
from typing import Any, NamedTuple

from ..coco_masks import usable_polygons

SIZES = {"small": 32**2, "medium": 96**2, "large": float("inf")}  # COCO's, in square pixels


class PartSummary(NamedTuple):
    """Counts of one part."""

    images: int
    empty: int  # images without objects
    objects: Counter[int | str]  # by category id
    crowd: int  # objects marked as a crowd, which training leaves out
    sizes: Counter[str]  # of boxes: keys of SIZES
    masks: Counter[str | None]  # of objects that are no crowd: "polygon", "rle", "point", None


def summarize(coco: dict[str, Any]) -> PartSummary:
    """Count what the COCO content of one part holds; entries that are wrong are passed over."""
    objects: Counter[int | str] = Counter()
    sizes: Counter[str] = Counter()
    masks: Counter[str | None] = Counter()
    crowd, with_objects = 0, set()
    for annotation in coco["annotations"]:
        objects[annotation["category_id"]] += 1
        with_objects.add(str(annotation.get("image_id")))
        crowd += annotation.get("iscrowd") in (1, True)
        if annotation.get("iscrowd") not in (1, True):
            masks[_kind(annotation.get("segmentation"))] += 1
        try:
            _, _, width, height = map(float, annotation["bbox"])
        except (KeyError, TypeError, ValueError):
            continue
        sizes[next((name for name, area in SIZES.items() if width * height < area), "large")] += 1
    empty = sum(str(image.get("id")) not in with_objects for image in coco["images"])
    return PartSummary(len(coco["images"]), empty, objects, crowd, sizes, masks)


def _kind(mask: Any) -> str | None:
    """Return "polygon", "rle" or None; "point" for polygons of less than three points."""
    if not mask or isinstance(mask, dict):
        return "rle" if mask else None
    return "point" if usable_polygons(mask) == [] else "polygon"


def mask_kind(parts: dict[str, PartSummary]) -> str | None:
    """Return "polygon" or "rle" if every object has a mask; None if one, or each, has none."""
    masks = count_masks(parts)
    if masks[None] or not (masks["polygon"] or masks["rle"]):
        return None
    return "rle" if masks["rle"] else "polygon"


def mask_counts(parts: dict[str, PartSummary]) -> tuple[int, int]:
    """Return (number of objects that are no crowd, number of these without a mask)."""
    masks = count_masks(parts)
    if not (masks["polygon"] or masks["rle"]):
        return masks.total(), masks.total()
    return masks.total(), masks[None]


def count_masks(parts: dict[str, PartSummary]) -> Counter[str | None]:
    """Return the number of objects that are no crowd by their masks, as `PartSummary.masks`."""
    return sum((part.masks for part in parts.values()), Counter())
