"""Counts of what a labelled folder holds."""

from collections import Counter
from typing import Any, NamedTuple

SIZES = {"small": 32**2, "medium": 96**2, "large": float("inf")}  # COCO's, in square pixels


class PartSummary(NamedTuple):
    """Counts of one part."""

    images: int
    empty: int  # images without objects
    objects: Counter[int | str]  # by category id
    crowd: int  # objects marked as a crowd, which training leaves out
    sizes: Counter[str]  # of boxes: keys of SIZES
    masks: Counter[str | None]  # of objects that are no crowd: "polygon", "rle", None


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
            mask = annotation.get("segmentation")
            masks["rle" if isinstance(mask, dict) else "polygon" if mask else None] += 1
        try:
            _, _, width, height = map(float, annotation["bbox"])
        except (KeyError, TypeError, ValueError):
            continue
        sizes[next((name for name, area in SIZES.items() if width * height < area), "large")] += 1
    empty = sum(str(image.get("id")) not in with_objects for image in coco["images"])
    return PartSummary(len(coco["images"]), empty, objects, crowd, sizes, masks)


def mask_kind(parts: dict[str, PartSummary]) -> str | None:
    """Return "polygon" or "rle" if every object has a mask; None if one has none."""
    masks = count_masks(parts)
    if masks[None] or not masks:
        return None
    return "rle" if masks["rle"] else "polygon"


def mask_counts(parts: dict[str, PartSummary]) -> tuple[int, int]:
    """Return (number of objects that are no crowd, number of these without a mask)."""
    masks = count_masks(parts)
    return masks.total(), masks[None]


def count_masks(parts: dict[str, PartSummary]) -> Counter[str | None]:
    """Return the number of objects that are no crowd by their masks: "polygon", "rle", None."""
    return sum((part.masks for part in parts.values()), Counter())
