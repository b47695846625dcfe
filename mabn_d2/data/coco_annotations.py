"""Checks the annotations of a COCO file: boxes, masks, keypoints, and what an evaluation needs."""

import math
from array import array
from collections import Counter
from typing import Any

import numpy as np

from .coco_findings import Edit, Findings, Problem
from .coco_images import Sizes
from .coco_masks import (
    NO_MASK,
    POLYGONS,
    RLE,
    MaskScan,
    are_numbers,
    cocos_form,
    mask_problem,
    scan_masks,
    usable_polygons,
)

LEAST_OVERLAP = 0.5  # intersection over union of a box and the bounds of its mask
LEAST_AREA = 0.01  # share of its box that an object without a mask has
REPEATED = 0.01  # share of annotations that may repeat others


class AnnotationCheck:
    """Looks at the annotations of a file and adds to `findings`."""

    # What is said of boxes; those of records that a function gives have other words.
    shares = "are they shares of the image? COCO has pixels"
    corners = "are they corners? COCO has x, y, width, height"
    outside = "and are clipped"
    no_area = "and are not trained on"

    def __init__(
        self, content: dict, sizes: Sizes, findings: Findings, masks: bool, evaluation: bool
    ) -> None:
        self.annotations, self.images = content["annotations"], content["images"]
        self.findings, self.masks, self.evaluation = findings, masks, evaluation
        positions = {image["id"]: i for i, image in enumerate(self.images)}
        # The image of each annotation; the last entry stands for one that is not there.
        found = (positions.get(a["image_id"], -1) for a in self.annotations)
        self.image_of = np.fromiter(found, np.int64, len(self.annotations))
        self.heights = np.append(sizes.heights, 0)[self.image_of]
        self.widths = np.append(sizes.widths, 0)[self.image_of]
        self.are_sizes = np.ones(len(self.annotations), bool)  # not the second corner of a box
        self.unfindable: set[int] = set()  # objects that an evaluation leaves out
        if evaluation:
            self.no_area = "and are left out"

    def inspect(self) -> None:
        suspects = set(np.flatnonzero(self.image_of < 0).tolist())
        suspects |= self._scan_boxes() | self._scan_others()
        scan = scan_masks(self.annotations, self.heights, self.widths)
        self.kinds = scan.kinds
        self.corrected: list[int] = []
        self.trimmed: list[int] = []
        self.dropped: list[int] = []
        self.unmasked: list[int] = []
        for position in sorted(suspects | scan.suspects):
            self._look_at(position)
        self._note_masks()
        if self.masks:
            self._compare_masks(scan)
        self._note_rotated()
        self._note_repeated()
        if self.evaluation:
            self._fill_in()
        self._count()

    def _name(self, position: int) -> str:
        return f"annotation {self.annotations[position]['id']}"

    def _read_boxes(self) -> tuple[np.ndarray, set[int]]:
        """Return (N, 4) x, y, width, height, and the positions of boxes that are not four numbers."""
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
        return np.frombuffer(numbers).reshape(-1, 4), bad

    def _scan_boxes(self) -> set[int]:
        """Return the positions of boxes that need a closer look; note what is doubtful."""
        numbers, bad = self._read_boxes()
        x, y, width, height = numbers.T
        right, bottom = x + width, y + height
        self.boxes = x, y, right, bottom
        known = self.heights > 0
        # Parts outside are common, from rounding, and clipped by Detectron2.
        good = (
            (width >= 0) & (height >= 0) & (right >= 0) & (bottom >= 0)
            & (x <= self.widths) & (y <= self.heights) & (right < np.inf) & (bottom < np.inf)
        )  # fmt: skip
        good[list(bad)] = False
        bad.update(np.flatnonzero(known & ~good).tolist())
        good &= known
        beyond = good & (
            (x < -1) | (y < -1) | (right > self.widths + 1) | (bottom > self.heights + 1)
        )
        corners = beyond & self.are_sizes & (x >= 0) & (y >= 0) & (width > x) & (height > y)
        corners &= (width <= self.widths + 1) & (height <= self.heights + 1)
        tiny = good & (right <= 1) & (bottom <= 1) & (width > 0) & (height > 0)
        empty = good & (
            (width == 0) | (height == 0) | (x == self.widths) | (y == self.heights)
            | (right == 0) | (bottom == 0)
        )  # fmt: skip
        self.has_area = ~empty
        count = len(self.annotations)
        self.other_form = tiny.sum() > 0.5 * count or corners.sum() > 0.1 * count
        self.doubtful = tiny | corners | empty | ~good  # boxes that a mask can't be compared with
        if tiny.sum() > 0.5 * count:
            self._note(tiny, f"lie within 0..1: {self.shares}")
        elif corners.sum() > 0.1 * count:
            self._note(corners, f"end outside of the image: {self.corners}")
        elif beyond.any() and (self.evaluation or beyond.sum() > 0.1 * count):
            self._note(beyond, f"end more than a pixel outside of the image, {self.outside}")
            if self.evaluation:  # predictions end at the border
                self._clip(np.flatnonzero(beyond))
        if empty.any():
            self._note(empty, f"have no area inside the image, {self.no_area}")
            if self.evaluation and not empty.all():
                self._leave_out(np.flatnonzero(empty))
        return bad

    def _clip(self, positions: np.ndarray) -> None:
        """End boxes at the border of their image, as Detectron2 does in training."""
        for position in positions.tolist():
            x, y, right, bottom = (float(side[position]) for side in self.boxes)
            x, y = max(x, 0.0), max(y, 0.0)
            right = min(right, float(self.widths[position]))
            bottom = min(bottom, float(self.heights[position]))
            self.findings.edits.append(
                Edit("annotations", position, "bbox", [x, y, right - x, bottom - y])
            )

    def _leave_out(self, positions: np.ndarray) -> None:
        """Leave out objects that a training does not learn and no prediction matches."""
        self.unfindable.update(
            p for p in positions.tolist() if not self.annotations[p].get("iscrowd")
        )
        self.findings.edits += [Edit("annotations", p, None) for p in sorted(self.unfindable)]

    def _note(self, which: np.ndarray, text: str) -> None:
        first = int(np.argmax(which))
        self.findings.notes.append(
            f"{which.sum()} of {len(which)} boxes {text} (the first: {self._name(first)}, "
            f"bbox {self.annotations[first]['bbox']})"
        )

    def _scan_others(self) -> set[int]:
        """Return the positions whose iscrowd, ignore or keypoints need a closer look."""
        self.keys = keys = set().union(*Counter(map(tuple, self.annotations)))
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
            wrong = box_problem(annotation["bbox"], size) or _other_problem(annotation)
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
        corrected = cocos_form(masks)
        if corrected is not masks and mask_problem(corrected, size) is None:
            self.corrected.append(position)
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
        for position in self.corrected:
            masks = cocos_form(self.annotations[position]["segmentation"])
            self.kinds[position] = RLE if isinstance(masks, dict) else POLYGONS
            edits.append(Edit("annotations", position, "segmentation", masks))
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
        used[[*problems, *self.dropped, *self.trimmed, *self.corrected]] = False
        x1, y1, x2, y2 = scan.bounds.T
        left, top, right, bottom = self.boxes
        compared = used & (x1 <= x2) & ~(self.doubtful | scan.empty)
        shares = (
            compared & (x1 >= 0) & (y1 >= 0) & (x2 <= 1) & (y2 <= 1) & (right > 2) & (bottom > 2)
        )
        elsewhere = (x1 > right + 1) | (x2 < left - 1) | (y1 > bottom + 1) | (y2 < top - 1)
        elsewhere &= compared & ~shares
        # Of small ones a pixel more or less decides.
        large = compared & ~(shares | elsewhere) & (np.minimum(right - left, bottom - top) >= 8)
        other = np.zeros(len(large), bool)
        other[large] = (
            _overlap(self._within(left, top, right, bottom), self._within(x1, y1, x2, y2))[large]
            < LEAST_OVERLAP
        )
        for which, share, text in (
            (shares, 0.1, "lie within 0..1: are they shares of the image? COCO has pixels"),
            (used & scan.empty, 0, "have no area"),
            (elsewhere, 0.1, "lie outside of their box"),
            (
                other,
                0.1,
                "have other bounds than their box: COCO has x, y of the upper left corner, width, "
                "height",
            ),
        ):
            if which is other and self.other_form:  # the note about the boxes says it
                continue
            if which.sum() > share * used.sum():
                first = self.annotations[int(np.argmax(which))]["id"]
                self.findings.notes.append(
                    f"{which.sum()} of {used.sum()} masks {text} (the first: annotation {first})"
                )

    def _within(self, *sides: np.ndarray) -> np.ndarray:
        """Return (4, N) x1, y1, x2, y2, clipped to the images."""
        limits = (self.widths, self.heights) * 2
        return np.stack([np.clip(s, 0, limit) for s, limit in zip(sides, limits, strict=True)])

    def _note_rotated(self) -> None:
        """CVAT gives the box that a rotated rectangle has before it is turned."""
        if "attributes" not in self.keys:
            return
        rotated = [
            annotation["id"]
            for annotation, kind in zip(self.annotations, self.kinds, strict=True)
            if kind == NO_MASK and _is_rotated(annotation)
        ]
        if rotated:
            self.findings.notes.append(
                f"{len(rotated)} of {len(self.annotations)} boxes are rotated (attributes.rotation; the "
                f"first: annotation {rotated[0]}), and COCO's bbox is not: draw these objects as "
                "polygons"
            )

    def _note_repeated(self) -> None:
        """One object that is there twice can be found only once."""
        classes: dict[Any, int] = {}
        numbers = [
            self.image_of.astype(np.float64),
            [classes.setdefault(a.get("category_id"), len(classes)) for a in self.annotations],
            *self.boxes,
        ]
        rows = np.stack(numbers, 1)
        # One number for each row, as sorting rows takes much longer.
        factors = np.random.default_rng(0).integers(1, 2**63, 6, dtype=np.uint64) | np.uint64(1)
        keys = (rows.view(np.uint64) * factors).sum(1, dtype=np.uint64)
        _, first, counts = np.unique(keys, return_index=True, return_counts=True)
        repeated = len(keys) - len(first)
        if repeated > REPEATED * len(keys):
            example = self._name(int(first[np.argmax(counts)]))
            self.findings.notes.append(
                f"{repeated} of {len(keys)} annotations repeat another of the same image, class and bbox "
                f"(one is {example}): a model finds each object once, so the AP will be too "
                "low; remove them"
            )

    def _fill_in(self) -> None:
        """What pycocotools needs for an evaluation beside what Detectron2 needs for training."""
        filled: Counter[str] = Counter()

        def fill(position: int, name: str, value: float) -> None:
            filled[name] += 1
            self.findings.edits.append(Edit("annotations", position, name, value))

        problems = self.findings.problems
        bad = {p.position for p in problems if p.key == "annotations"} | self.unfindable
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
            if not self._is_area(position, annotation.get("area")):
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

    def _is_area(self, position: int, area: Any) -> bool:
        """Return whether `area` can be that of an object with this box."""
        if not _is_number(area) or area < 0:  # of a polygon the other way round
            return False
        if not self.has_area[position]:
            return True
        _, _, width, height = self.annotations[position]["bbox"]
        least = LEAST_AREA * width * height if self.kinds[position] == NO_MASK else 0
        return bool(area > 0 and least <= area <= 2 * (width + 1) * (height + 1))

    def _count(self) -> None:
        """Fill the summary with what is left after the edits."""
        summary = self.findings.summary
        problems = self.findings.problems
        left_out = {p.position for p in problems if p.key == "annotations"}
        left_out |= {*self.dropped, *self.unfindable}
        images: Counter[int] = Counter()  # objects of each
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
            images[int(self.image_of[position])] += 1
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
        for position in bad_images:
            del images[position]
        summary.images_with_objects = len(images)
        summary.objects_per_image = Counter(images.values())


def _overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the intersection over union of boxes (4, N) x1, y1, x2, y2; 0 where both are empty."""
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = np.prod(np.clip(high - low, 0, None), 0)
    union = np.prod(one[2:] - one[:2], 0) + np.prod(other[2:] - other[:2], 0) - shared
    return shared / np.where(union > 0, union, 1)


def _is_rotated(annotation: dict) -> bool:
    attributes = annotation.get("attributes")
    angle: Any = attributes.get("rotation") if isinstance(attributes, dict) else 0
    return _is_number(angle) and angle % 360 != 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _area(annotation: dict, kind: int, size: tuple[int, int]) -> float:
    """Return the area in pixels of an annotation's mask, or else of its box."""
    import pycocotools.mask as mask_util

    masks: Any = cocos_form(annotation.get("segmentation"))
    if kind == NO_MASK:
        return annotation["bbox"][2] * annotation["bbox"][3]
    if kind == POLYGONS:
        masks = mask_util.merge(mask_util.frPyObjects(usable_polygons(masks), *size))
    elif isinstance(masks["counts"], list):
        masks = mask_util.frPyObjects(masks, *size)
    return float(mask_util.area(masks))


def box_problem(box: Any, size: list[int]) -> str | None:
    height, width = size
    if not isinstance(box, list) or len(box) != 4 or not are_numbers(box):
        return f"bbox {box!r:.80}, not four numbers within 1e9"
    x, y, w, h = box
    if w < 0 or h < 0:
        return f"bbox {box} with a negative width or height"
    if x > width or y > height or x + w < 0 or y + h < 0:
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
