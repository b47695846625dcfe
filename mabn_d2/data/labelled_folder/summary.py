"""The short table of what a labelled folder holds."""

from collections import Counter
from typing import Any, NamedTuple

from tabulate import tabulate

from .contents import LabelledFolder
from .layouts import WHOLE

SIZES = {"small": 32**2, "medium": 96**2, "large": float("inf")}  # COCO's, in square pixels
MAX_CLASSES = 30  # rows of the table


class PartSummary(NamedTuple):
    """Counts of one part."""

    images: int
    empty: int  # images without objects
    objects: Counter  # by category id
    crowd: int  # objects marked as a crowd, which training leaves out
    sizes: Counter  # of boxes: keys of SIZES
    masks: Counter  # of objects that are no crowd: "polygon", "rle", None


def summarize(coco: dict[str, Any]) -> PartSummary:
    """Count what the COCO content of one part holds; entries that are wrong are passed over."""
    objects, sizes, masks, crowd, with_objects = Counter(), Counter(), Counter(), 0, set()
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
    masks = _masks(parts)
    if masks[None] or not masks:
        return None
    return "rle" if masks["rle"] else "polygon"


def mask_counts(parts: dict[str, PartSummary]) -> tuple[int, int]:
    """Return (number of objects that are no crowd, number of these without a mask)."""
    masks = _masks(parts)
    return masks.total(), masks[None]


def _masks(parts):
    return sum((part.masks for part in parts.values()), Counter())


def table(
    folder: LabelledFolder,
    parts: dict[str, PartSummary],
    settings: dict[str, Any],
    val_share: float,
) -> str:
    """Return the text that is printed when a run starts.

    Args:
        parts: the summary of each part.
        settings: config keys that were set from the folder, and their values.
    """
    layout = folder.layout
    rows = [
        [key, s.images, s.empty, s.objects.total(), *(s.sizes[name] for name in SIZES)]
        for key, s in parts.items()
    ]
    blocks = [
        f"{layout.folder}: layout {layout.name}, {len(folder.categories)} classes, {_mask_text(parts)}",
        tabulate(
            rows,
            ["part", "images", "without objects", "objects", "small", "medium", "large"],
            tablefmt="github",
        ),
        "small: box below 32 x 32 pixels, large: from 96 x 96",
        tabulate(
            [
                [_printable(c["name"]), *(s.objects[c["id"]] for s in parts.values())]
                for c in folder.categories[:MAX_CLASSES]
            ],
            ["class", *parts],
            tablefmt="github",
            disable_numparse=[0],
        ),
    ]
    if len(folder.categories) > MAX_CLASSES:
        blocks.append(f"and {len(folder.categories) - MAX_CLASSES} more classes")
    blocks += _notes(folder, parts, val_share)
    blocks += [f"set: {key} {value}" for key, value in settings.items()]
    return "\n".join(blocks)


def _mask_text(parts):
    masks = _masks(parts)
    texts = {"polygon": "{} polygon masks", "rle": "{} RLE masks", None: "{} boxes without a mask"}
    return ", ".join(texts[key].format(masks[key]) for key in texts if masks[key]) or "no objects"


def _notes(folder, parts, val_share):
    notes = [f"left out or doubtful: {_printable(note)}" for note in folder.notes]
    if folder.held_out:
        notes.append(
            f"val: held out from the folder's images by a hash of their names, share {val_share:g} "
            "(DATASETS.VAL_SHARE); it is not trained on"
        )
    if WHOLE in parts:
        notes.append(
            "all images are evaluated; AP is too high if the model was trained on some of them"
        )
    if "train" in parts:
        train = parts["train"]
        if train.empty:
            notes.append(
                f"left out: {train.empty} training images without objects (to train on them as "
                "background: DATALOADER.FILTER_EMPTY_ANNOTATIONS False)"
            )
        if train.crowd:
            notes.append(f"left out: {train.crowd} training objects marked iscrowd")
        never = [c["name"] for c in folder.categories if not train.objects[c["id"]]]
        if never:
            notes.append(f"no object to train on: class {_printable(', '.join(never[:10]))}")
    objects, without = mask_counts(parts)
    if 0 < without < objects:
        notes.append(
            f"{without} of {objects} objects have no mask, so masks are not trained: draw "
            "them, or remove these objects"
        )
    return notes


def _printable(text):
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
