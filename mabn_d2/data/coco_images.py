"""Checks the images of a COCO file: they are there, and have the sizes that it says."""

import os
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .coco_findings import Edit, Findings, Problem
from .errors import BadAnnotationError, one_line
from .mapper import check_header, exif_orientation

MAX_PIXELS = 2**31  # pycocotools counts in 32 bits
OPENED = 1_000  # image files whose size is compared with the JSON


class Sizes(NamedTuple):
    """Sizes of the images, by their position; 0 for those that can't be used."""

    heights: np.ndarray
    widths: np.ndarray


def inspect_images(
    images: list[dict], json_file: str, image_root: str, findings: Findings, evaluation: bool
) -> Sizes:
    """Look at all image entries and at a sample of the files, and add to `findings`.

    Args:
        evaluation: whether the file is used for evaluation, which has no use for an image that can't
            be read: it ends there.
    Raises:
        BadAnnotationError: if the sizes of most images are wrong.
    """
    heights, widths = np.zeros(len(images), np.int64), np.zeros(len(images), np.int64)
    exists = _Files(image_root)
    for position, image in enumerate(images):
        height, width, file = image["height"], image["width"], image["file_name"]
        if not (_is_size(height) and _is_size(width) and height * width < MAX_PIXELS):
            text = f"image {image['id']} has height {height!r:.40}, width {width!r:.40}"
        elif not isinstance(file, str) or not exists(file):
            text = f"image {image['id']}: no file {os.path.join(image_root, str(file))}"
        else:
            heights[position], widths[position] = height, width
            for name, value in (("height", height), ("width", width)):
                if type(value) is float:  # 64.0, which the evaluation does not take
                    findings.edits.append(Edit("images", position, name, int(value)))
            continue
        findings.problems.append(Problem("images", image["id"], text, position))
    sizes = Sizes(heights, widths)
    _compare_with_files(images, json_file, image_root, sizes, findings, evaluation)
    return sizes


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < MAX_PIXELS and value == int(value)


class _Files:
    """Tells whether files exist; reads each folder once, which is faster than to ask for each file."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.folders: dict[str, set[str]] = {}

    def __call__(self, file: str) -> bool:
        folder, name = os.path.split(os.path.join(self.root, file))
        if folder not in self.folders:
            try:
                with os.scandir(folder or ".") as entries:
                    self.folders[folder] = {entry.name for entry in entries if entry.is_file()}
            except (OSError, ValueError):
                self.folders[folder] = set()
        # Names may differ and yet be the same to the file system: upper case, Unicode forms.
        return name in self.folders[folder] or _is_file(os.path.join(folder, name))


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # a null character
        return False


def _compare_with_files(
    images: list[dict],
    json_file: str,
    image_root: str,
    sizes: Sizes,
    findings: Findings,
    evaluation: bool,
) -> None:
    """Width and height are those of the image files; a sample, of up to OPENED."""
    usable = np.flatnonzero(sizes.heights)
    sample = usable[np.linspace(0, len(usable) - 1, min(OPENED, len(usable)), dtype=int)]
    wrong, swapped, swapped_by_tag = [], 0, 0
    unreadable: list[str] = []
    unseen: list[str] = []  # turned or mirrored, which the size does not show
    for position in sample.tolist():
        image = images[position]
        path = os.path.join(image_root, image["file_name"])
        given = int(sizes.widths[position]), int(sizes.heights[position])
        try:
            found, stored, is_turned = _read_size(path)
        except Exception as error:  # readers raise anything for a damaged file
            if evaluation:
                text = f"image {image['id']}: {path} can't be read ({one_line(error)})"
                findings.problems.append(Problem("images", image["id"], text, position))
            else:  # it is named again when it is read
                unreadable.append(f"{path} ({one_line(error)})")
            continue
        if is_turned and found == stored:
            unseen.append(path)
        if found == given:
            continue
        swapped += found == given[::-1]
        swapped_by_tag += found != stored == given
        turned = ", turned by its EXIF tag Orientation" if found != stored else ""
        text = (
            f"image {image['id']} has width {given[0]} and height {given[1]}, but {path} is "
            f"{found[0]} wide and {found[1]} high{turned}"
        )
        if found != stored == given:
            text += "; it was labelled as it is stored: remove the tag"
        wrong.append(Problem("images", image["id"], text, position))
    if swapped_by_tag > len(sample) / 2:
        raise BadAnnotationError(
            f"{json_file}: {swapped_by_tag} of {len(sample)} images that were compared with their files "
            f"were labelled as they are stored, but are shown turned ({wrong[0]}): remove the tag "
            "from the image files, which every program then shows as they were labelled"
        )
    if swapped > len(sample) / 2:
        raise BadAnnotationError(
            f"{json_file}: width and height are swapped in {swapped} of {len(sample)} images that "
            f"were compared with their files ({wrong[0]}): correct width and height in the JSON"
        )
    findings.problems.extend(wrong)
    if unseen:
        findings.notes.append(
            f"{len(unseen)} of {len(sample)} image files that were looked at are read as their EXIF tag "
            f"Orientation turns or mirrors them, such as {unseen[0]}: if they were labelled as they are "
            "stored, remove the tag"
        )
    if unreadable:
        findings.notes.append(
            f"{len(unreadable)} of {len(sample)} image files that were looked at can't be read, such "
            f"as {unreadable[0]}: repair or remove them"
        )


def _read_size(path: str) -> tuple[tuple[int, int], tuple[int, int], bool]:
    """Return (width, height) as Detectron2 sees an image, and as it is stored, and whether its tag turns it.

    Raises:
        Exception: of any kind, if it can't be read; ValueError for one that `check_header` refuses.
    """
    with Image.open(path) as image:
        check_header(image)
        stored = image.size
        orientation = exif_orientation(image)
    shown = stored[::-1] if orientation in (5, 6, 7, 8) else stored
    return shown, stored, orientation in (2, 3, 4, 5, 6, 7, 8)
