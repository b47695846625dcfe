"""What is wrong with a COCO file, found before the training instead of in its midst."""

import logging
import math
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .coco_masks import (
    NO_MASK,
    POLYGONS,
    RLE,
    MaskScan,
    are_numbers,
    mask_problem,
    scan_masks,
    usable_polygons,
)
from .coco_parsing import is_text, read_json
from .dataset_summary import DatasetSummary
from .errors import BadAnnotationError

SHOWN = 5  # problems named in a message
MAX_PIXELS = 2**31  # pycocotools counts in 32 bits
OPENED = 1_000  # image files whose size is compared with the JSON

FIELDS = {
    "images": {"id", "file_name", "height", "width"},
    "annotations": {"id", "image_id", "category_id", "bbox"},
    "categories": {"id", "name"},
}


class Problem(NamedTuple):
    """What is wrong with one entry, which can be left out."""

    key: str  # "images" or "annotations"
    id: int | str
    text: str
    position: int = -1  # in the list of that key

    def __str__(self) -> str:
        return self.text


class Edit(NamedTuple):
    """A change to one entry of the parsed file."""

    key: str  # "images" or "annotations"
    position: int
    field: str | None  # None: leave the entry out
    value: Any = None


@dataclass
class Findings:
    """The result of `inspect`.

    Attributes:
        problems: entries that can't be used.
        edits: changes with which the rest can be used.
        notes: one line for each kind of thing that is doubtful, with counts.
    """

    summary: DatasetSummary
    problems: list[Problem] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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


def refuse(problems: list[Problem], json_file: str, remedy: str) -> None:
    """Raise BadAnnotationError if there are problems."""
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise BadAnnotationError(
            f"{json_file}: {'; '.join(map(str, problems[:SHOWN]))}{more}. Correct the file, {remedy}"
        )


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
    findings.summary.files = {
        os.path.normpath(os.path.join(image_root, str(i["file_name"]))) for i in content["images"]
    }
    sizes = _inspect_images(content["images"], json_file, image_root, findings)
    _Annotations(content, sizes, findings, masks, evaluation).inspect()
    _note_classes(content, findings)
    return findings


def apply_edits(content: dict, edits: Iterable[Edit]) -> None:
    """Change the content of a COCO file in place."""
    dropped: dict[str, set[int]] = {"images": set(), "annotations": set()}
    for edit in edits:
        if edit.field is None:
            dropped[edit.key].add(edit.position)
        else:
            content[edit.key][edit.position][edit.field] = edit.value
    for key, positions in dropped.items():
        if positions:
            content[key] = [e for i, e in enumerate(content[key]) if i not in positions]
    if dropped["images"]:
        images = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in images]


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


class _Sizes(NamedTuple):
    """Sizes of the images, by their position; 0 for those that can't be used."""

    heights: np.ndarray
    widths: np.ndarray


def _inspect_images(
    images: list[dict], json_file: str, image_root: str, findings: Findings
) -> _Sizes:
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
    sizes = _Sizes(heights, widths)
    _compare_with_files(images, json_file, image_root, sizes, findings)
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
    images: list[dict], json_file: str, image_root: str, sizes: _Sizes, findings: Findings
) -> None:
    """Width and height are those of the image files; a sample, of up to OPENED."""
    usable = np.flatnonzero(sizes.heights)
    sample = usable[np.linspace(0, len(usable) - 1, min(OPENED, len(usable)), dtype=int)]
    wrong, swapped, swapped_by_tag = [], 0, 0
    unreadable: list[str] = []
    for position in sample.tolist():
        image = images[position]
        path = os.path.join(image_root, image["file_name"])
        found, stored = _read_size(path)
        given = int(sizes.widths[position]), int(sizes.heights[position])
        if found is None:
            unreadable.append(path)
        if found in (None, given):
            continue
        swapped += found == given[::-1]
        swapped_by_tag += found != stored == given
        turned = ", turned by its EXIF tag Orientation" if found != stored else ""
        text = (
            f"image {image['id']} has width {given[0]} and height {given[1]}, but {path} is "
            f"{found[0]} wide and {found[1]} high{turned}"
        )
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
    if unreadable:
        findings.notes.append(
            f"{len(unreadable)} of {len(sample)} image files that were looked at can't be read, such "
            f"as {unreadable[0]}: repair or remove them"
        )


def _read_size(path: str) -> tuple[tuple[int, int], tuple[int, int]] | tuple[None, None]:
    """Return (width, height) as Detectron2 sees an image, and as it is stored; None if unreadable."""
    try:
        with Image.open(path) as image:
            stored = image.size
            turned = image.getexif().get(274) in (5, 6, 7, 8)  # tag Orientation
    except Exception:  # a damaged image is named when it is read
        return None, None
    return (stored[::-1] if turned else stored), stored


class _Annotations:
    """Looks at the annotations of a file and adds to `findings`."""

    def __init__(
        self, content: dict, sizes: _Sizes, findings: Findings, masks: bool, evaluation: bool
    ) -> None:
        self.annotations, self.images = content["annotations"], content["images"]
        self.findings, self.masks, self.evaluation = findings, masks, evaluation
        positions = {image["id"]: i for i, image in enumerate(self.images)}
        # The image of each annotation; the last entry stands for one that is not there.
        found = (positions.get(a["image_id"], -1) for a in self.annotations)
        self.image_of = np.fromiter(found, np.int64, len(self.annotations))
        self.heights = np.append(sizes.heights, 0)[self.image_of]
        self.widths = np.append(sizes.widths, 0)[self.image_of]

    def inspect(self) -> None:
        suspects = set(np.flatnonzero(self.image_of < 0).tolist())
        suspects |= self._scan_boxes() | self._scan_others()
        scan = scan_masks(self.annotations, self.heights, self.widths)
        self.kinds = scan.kinds
        self.trimmed: list[int] = []
        self.dropped: list[int] = []
        self.unmasked: list[int] = []
        for position in sorted(suspects | scan.suspects):
            self._look_at(position)
        self._note_masks()
        if self.masks:
            self._compare_masks(scan)
        if self.evaluation:
            self._fill_in()
        self._count()

    def _scan_boxes(self) -> set[int]:
        """Return the positions of boxes that need a closer look; note what is doubtful."""
        numbers, bad = array("d"), set()
        for position, annotation in enumerate(self.annotations):
            box = annotation["bbox"]
            try:
                if len(box) != 4:
                    raise ValueError
                numbers.fromlist(box)
            except (TypeError, ValueError, OverflowError):
                bad.add(position)
                numbers.extend((0, 0, 0, 0))
        x, y, width, height = np.frombuffer(numbers).reshape(-1, 4).T
        right, bottom = x + width, y + height
        self.boxes = x, y, right, bottom
        known = self.heights > 0
        # Parts outside are common, from rounding, and clipped by Detectron2.
        good = (
            (width >= 0) & (height >= 0) & (right >= 0) & (bottom >= 0)
            & (x <= self.widths) & (y <= self.heights) & (right < np.inf) & (bottom < np.inf)
        )  # fmt: skip
        bad.update(np.flatnonzero(known & ~good).tolist())
        good &= known
        beyond = good & ((right > self.widths + 1) | (bottom > self.heights + 1))
        corners = beyond & (width > x) & (height > y)
        corners &= (width <= self.widths + 1) & (height <= self.heights + 1)
        tiny = good & (right <= 1) & (bottom <= 1) & (width > 0) & (height > 0)
        empty = good & (
            (width == 0) | (height == 0) | (x == self.widths) | (y == self.heights)
            | (right == 0) | (bottom == 0)
        )  # fmt: skip
        self.has_area = ~empty
        count = len(self.annotations)
        self.doubtful = tiny | corners | empty | ~good  # boxes that a mask can't be compared with
        if tiny.sum() > 0.5 * count:
            self._note(tiny, "lie within 0..1: are they shares of the image? COCO has pixels")
        elif corners.sum() > 0.1 * count:
            self._note(
                corners, "end outside of the image: are they corners? COCO has x, y, width, height"
            )
        elif beyond.sum() > 0.1 * count:
            self._note(beyond, "end more than a pixel outside of the image, and are clipped")
        if empty.any():
            self._note(empty, "have no area inside the image, and are not trained on")
        return bad

    def _note(self, which: np.ndarray, text: str) -> None:
        first = self.annotations[int(np.argmax(which))]
        self.findings.notes.append(
            f"{which.sum()} of {len(which)} boxes {text} (the first: annotation {first['id']}, "
            f"bbox {first['bbox']})"
        )

    def _scan_others(self) -> set[int]:
        """Return the positions whose iscrowd, ignore or keypoints need a closer look."""
        keys = set().union(*Counter(map(tuple, self.annotations)))
        bad = set()
        for name, values in (("iscrowd", (0, 1)), ("ignore", (0,))):
            if name not in keys:
                continue
            column = [annotation.get(name, 0) for annotation in self.annotations]
            if set(map(type, column)) <= {int, bool} and set(column) <= set(values):
                continue
            for position, value in enumerate(column):
                if value is None:  # the same as none
                    self.findings.edits.append(Edit("annotations", position, name, 0))
                elif type(value) not in (int, bool) or value not in values:
                    bad.add(position)
        if "keypoints" in keys:
            column = [annotation.get("keypoints") or [] for annotation in self.annotations]
            for position, points in enumerate(column):
                if not isinstance(points, list) or len(points) % 3 or not are_numbers(points):
                    bad.add(position)
        return bad

    def _look_at(self, position: int) -> None:
        """Add what is wrong with one annotation."""
        annotation = self.annotations[position]
        name, image_id = f"annotation {annotation['id']}", annotation["image_id"]
        size = [int(self.heights[position]), int(self.widths[position])]
        wrong: str | None
        if self.image_of[position] < 0:
            wrong = f"{name} belongs to image {image_id!r}, which is not there"
        elif not size[0]:
            return  # it goes with its image
        else:
            wrong = _box_problem(annotation["bbox"], size) or _other_problem(annotation)
            wrong = wrong or self._mask_problem(position, annotation, size)
            wrong = wrong and f"{name} (image {image_id}) has {wrong}"
        if wrong:
            problem = Problem("annotations", annotation["id"], wrong, position)
            self.findings.problems.append(problem)

    def _mask_problem(self, position: int, annotation: dict, size: list[int]) -> str | None:
        """Return what is wrong with the masks, or None if an edit repairs it."""
        masks = annotation.get("segmentation")
        problem = mask_problem(masks, size) if masks else None
        if problem is None:
            return None
        if not self.masks:
            self.unmasked.append(position)
            return None
        usable = usable_polygons(masks)
        if usable is None or (usable and mask_problem(usable, size)):
            return problem
        if usable:
            self.trimmed.append(position)
        elif self.evaluation:
            return problem
        else:
            self.dropped.append(position)
        return None

    def _note_masks(self) -> None:
        edits, notes = self.findings.edits, self.findings.notes
        for positions, text in (
            (self.trimmed, "masks have a part of less than three points, which is left out"),
            (self.dropped, "objects have a mask of less than three points, and are left out"),
            (self.unmasked, "masks can't be used, and are left out; their boxes are used"),
        ):
            if positions:
                first = self.annotations[positions[0]]["id"]
                notes.append(f"{len(positions)} {text} (the first: annotation {first})")
        for position in self.trimmed:
            usable = usable_polygons(self.annotations[position]["segmentation"])
            edits.append(Edit("annotations", position, "segmentation", usable))
        for position in self.dropped:
            edits.append(Edit("annotations", position, None))
        for position in self.unmasked:
            self.kinds[position] = NO_MASK
            edits.append(Edit("annotations", position, "segmentation", []))

    def _compare_masks(self, scan: MaskScan) -> None:
        """Note masks that contradict their boxes."""
        problems = {p.position for p in self.findings.problems if p.key == "annotations"}
        used = self.kinds != NO_MASK
        used[[*problems, *self.dropped, *self.trimmed]] = False
        x1, y1, x2, y2 = scan.bounds.T
        left, top, right, bottom = self.boxes
        compared = used & (x1 <= x2) & ~(self.doubtful | scan.empty)
        shares = (
            compared & (x1 >= 0) & (y1 >= 0) & (x2 <= 1) & (y2 <= 1) & (right > 2) & (bottom > 2)
        )
        elsewhere = (x1 > right + 1) | (x2 < left - 1) | (y1 > bottom + 1) | (y2 < top - 1)
        elsewhere &= compared & ~shares
        for which, share, text in (
            (shares, 0.1, "lie within 0..1: are they shares of the image? COCO has pixels"),
            (used & scan.empty, 0, "have no area"),
            (elsewhere, 0.1, "lie outside of their box"),
        ):
            if which.sum() > share * used.sum():
                first = self.annotations[int(np.argmax(which))]["id"]
                self.findings.notes.append(
                    f"{which.sum()} of {used.sum()} masks {text} (the first: annotation {first})"
                )

    def _fill_in(self) -> None:
        """What pycocotools needs for an evaluation beside what Detectron2 needs for training."""
        filled: Counter[str] = Counter()

        def fill(position: int, name: str, value: float) -> None:
            filled[name] += 1
            self.findings.edits.append(Edit("annotations", position, name, value))

        problems = self.findings.problems
        bad = {p.position for p in problems if p.key == "annotations"}
        ids = [annotation["id"] for annotation in self.annotations]
        # pycocotools stores the id of the object that a detection matches in an array of numbers,
        # where 0 means none.
        renumber = any(type(i) is not int or i == 0 for i in ids)
        for position, annotation in enumerate(self.annotations):
            if renumber:
                self.findings.edits.append(Edit("annotations", position, "id", position + 1))
            if position in bad:
                continue
            if annotation.get("iscrowd") is None:
                fill(position, "iscrowd", 0)
            area = annotation.get("area")
            if not _is_number(area) or area < 0:  # of a polygon the other way round
                size = int(self.heights[position]), int(self.widths[position])
                fill(position, "area", _area(annotation, self.kinds[position], size))
            if annotation.get("keypoints") and annotation.get("num_keypoints") is None:
                visible = sum(v > 0 for v in annotation["keypoints"][2::3])
                fill(position, "num_keypoints", visible)
        if filled:
            counts = ", ".join(f"{name} of {n}" for name, n in filled.items())
            self.findings.notes.append(
                f"filled in for the evaluation: {counts} annotations (area from the mask or the box)"
            )

    def _count(self) -> None:
        """Fill the summary with what is left after the edits."""
        summary = self.findings.summary
        problems = self.findings.problems
        left_out = {p.position for p in problems if p.key == "annotations"}
        left_out |= set(self.dropped)
        images = set()
        for position, annotation in enumerate(self.annotations):
            if position in left_out or not self.heights[position]:
                continue  # with its image
            kind = self.kinds[position]
            if annotation.get("iscrowd"):
                summary.crowds += 1
                summary.crowds_without_mask += kind == NO_MASK
                continue
            summary.objects += 1
            summary.objects_with_area += bool(self.has_area[position])
            images.add(int(self.image_of[position]))
            if kind == POLYGONS:
                summary.objects_with_mask += 1
            elif kind == RLE:
                summary.objects_with_mask += 1
                summary.objects_with_rle += 1
                if not summary.rle:
                    summary.rle = f"annotation {annotation['id']}"
            elif not summary.no_mask:
                summary.no_mask = f"annotation {annotation['id']}"
            points = annotation.get("keypoints")
            if points:
                summary.objects_with_keypoints += 1
                summary.keypoint_counts[len(points) // 3] += 1
            elif not summary.no_keypoints:
                summary.no_keypoints = f"annotation {annotation['id']}"
        bad_images = {p.position for p in problems if p.key == "images"}
        summary.images_with_objects = len(images - bad_images)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _area(annotation: dict, kind: int, size: tuple[int, int]) -> float:
    """Return the area in pixels of an annotation's mask, or else of its box."""
    import pycocotools.mask as mask_util

    masks: Any = annotation.get("segmentation")
    if kind == NO_MASK:
        return annotation["bbox"][2] * annotation["bbox"][3]
    if kind == POLYGONS:
        masks = mask_util.merge(mask_util.frPyObjects(usable_polygons(masks), *size))
    elif isinstance(masks["counts"], list):
        masks = mask_util.frPyObjects(masks, *size)
    return float(mask_util.area(masks))


def _box_problem(box: Any, size: list[int]) -> str | None:
    height, width = size
    if not isinstance(box, list) or len(box) != 4 or not are_numbers(box):
        return f"bbox {box!r:.80}, not four numbers within 1e9"
    x, y, w, h = box
    if w < 0 or h < 0 or x > width or y > height or x + w < 0 or y + h < 0:
        return f"bbox {box} outside of the image, {width} wide and {height} high"
    return None


def _other_problem(annotation: dict) -> str | None:
    points = annotation.get("keypoints") or []
    if not isinstance(points, list) or len(points) % 3 or not are_numbers(points):
        return "keypoints that are not three numbers each"
    for name, values in (("iscrowd", (0, 1)), ("ignore", (0,))):
        value = annotation.get(name, 0)
        if value is not None and (type(value) not in (int, bool) or value not in values):
            return f"{name} {value!r:.80}, not {' or '.join(map(str, values))}"
    return None


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


def problems_by_kind(problems: list[Problem]) -> Iterator[str]:
    """Yield a line for the problems with images and one for those with annotations."""
    for key in ("images", "annotations"):
        found = [problem for problem in problems if problem.key == key]
        if found:
            more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            yield f"{len(found)} {key} are left out: {'; '.join(map(str, found[:SHOWN]))}{more}"
