"""Turns what labelling tools write into the form that COCO defines."""

from typing import Any

from ..coco_masks import cocos_form

IDS = {
    "images": ("id",),
    "categories": ("id",),
    "annotations": ("id", "image_id", "category_id"),
}


def normalize(coco: dict[str, Any]) -> bool:
    """Correct the forms of ids and masks, in place; return whether anything was changed.

    Ids such as 3.0 become whole numbers, and so does a reference "3" to the entry 3. Masks get
    `cocos_form`.
    """
    changed = False
    for key, names in IDS.items():
        for entry in coco[key]:
            for name in names:
                value = entry.get(name)
                if type(value) is float and value.is_integer():
                    entry[name], changed = int(value), True
    for key, name in (("images", "image_id"), ("categories", "category_id")):
        ids = {entry.get("id") for entry in coco[key] if isinstance(entry.get("id"), (int, str))}
        for annotation in coco["annotations"]:
            value = annotation.get(name)
            if isinstance(value, str) and value not in ids and _number(value) in ids:
                annotation[name], changed = _number(value), True
    for annotation in coco["annotations"]:
        masks = annotation.get("segmentation")
        if (corrected := cocos_form(masks)) is not masks:
            annotation["segmentation"], changed = corrected, True
    return changed


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() else None
