"""The short table of what was found in a labelled folder and what was set from it."""

from typing import Any

from tabulate import tabulate

from .layouts import WHOLE
from .register import PreparedFolder
from .summary import SIZES, PartSummary, count_masks, mask_counts

MAX_CLASSES = 30  # rows of the table


def report(folder: PreparedFolder, settings: dict[str, Any], val_share: float) -> str:
    """Return the text that is printed when a run starts.

    Args:
        settings: config keys that were set from the folder, and their values.
        val_share: the share of the images that was asked for to validate on.
    """
    parts, classes = folder.summaries, folder.classes
    rows = [
        [key, s.images, s.empty, s.objects.total(), *(s.sizes[name] for name in SIZES)]
        for key, s in parts.items()
    ]
    blocks = [
        f"{folder.path}: layout {folder.layout}, {len(classes)} classes, {_mask_text(parts)}",
        tabulate(
            rows,
            ["part", "images", "without objects", "objects", "small", "medium", "large"],
            tablefmt="github",
        ),
        "small: box below 32 x 32 pixels, large: from 96 x 96",
        tabulate(
            [
                [_printable(name), *(s.objects[id] for s in parts.values())]
                for id, name in list(classes.items())[:MAX_CLASSES]
            ],
            ["class", *parts],
            tablefmt="github",
            disable_numparse=[0],
        ),
    ]
    if len(classes) > MAX_CLASSES:
        blocks.append(f"and {len(classes) - MAX_CLASSES} more classes")
    blocks += _notes(folder, val_share)
    blocks += [f"set: {key} {value}" for key, value in settings.items()]
    return "\n".join(blocks)


def _mask_text(parts: dict[str, PartSummary]) -> str:
    masks = count_masks(parts)
    texts = {
        "polygon": "{} polygon masks",
        "rle": "{} RLE masks",
        "point": "{} masks of less than three points",
        None: "{} boxes without a mask",
    }
    return ", ".join(texts[key].format(masks[key]) for key in texts if masks[key]) or "no objects"


def _notes(folder: PreparedFolder, val_share: float) -> list[str]:
    parts = folder.summaries
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
        never = [name for id, name in folder.classes.items() if not train.objects[id]]
        if never:
            notes.append(f"no object to train on: class {_printable(', '.join(never[:10]))}")
    objects, without = mask_counts(parts)
    if 0 < without < objects:
        notes.append(
            f"{without} of {objects} objects have no mask, so masks are not trained: draw "
            "them, or remove these objects"
        )
    return notes


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
