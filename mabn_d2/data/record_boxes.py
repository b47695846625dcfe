"""Checks the boxes of records that a function gives, by the rules for boxes of COCO files."""

from array import array

import numpy as np
from detectron2.structures import BoxMode

from .coco_annotations import AnnotationCheck, box_problem
from .coco_findings import Findings, Problem

NAMES = {BoxMode.XYXY_ABS: "XYXY_ABS", BoxMode.XYWH_ABS: "XYWH_ABS"}  # modes that are looked at
UNKNOWN = 10**9  # pixels, of an image whose size Detectron2 reads from the file


class RecordCheck(AnnotationCheck):
    """Looks at the boxes of records in Detectron2's format and adds to `findings`.

    Boxes of another form, such as rotated ones, are left to the model that takes them.

    Attributes:
        places: (N, 2) position of the record and in its annotations, of each box.
    """

    shares = "are they shares of the image? bbox_mode says pixels"
    corners = "are they corners? then bbox_mode is XYXY_ABS"

    def __init__(self, records: list[dict], findings: Findings, evaluation: bool) -> None:
        self.records, self.findings, self.evaluation = records, findings, evaluation
        if evaluation:  # the evaluator reads them as they are
            self.outside = "where no prediction ends: clip them"
            self.no_area = "and count as objects that are not found: remove them"
        self.annotations: list[dict] = []
        places = array("q")
        for index, record in enumerate(records):
            for position, annotation in enumerate(record.get("annotations", ())):
                if _is_looked_at(annotation, evaluation):
                    self.annotations.append(annotation)
                    places.extend((index, position))
        self.places = np.array(places, np.int64).reshape(-1, 2)
        self.image_of = self.places[:, 0]
        sizes = np.array([[_size(r, "height"), _size(r, "width")] for r in records], np.int64)
        self.heights, self.widths = sizes.reshape(-1, 2)[self.image_of].T

    def inspect(self) -> None:
        for position in sorted(self._scan_boxes()):
            self._look_at(position)
        self._note_repeated()

    def objects_without_area(self) -> int:
        """Return how many objects have no area inside the image."""
        empty = np.flatnonzero(~self.has_area).tolist()
        return sum(not self.annotations[position].get("iscrowd") for position in empty)

    def _name(self, position: int) -> str:
        index, place = self.places[position].tolist()
        record = self.records[index]
        return f"annotation {place} of {record.get('file_name', record.get('image_id'))}"

    def _read_boxes(self) -> tuple[np.ndarray, set[int]]:
        numbers = array("d")
        self.unread: set[int] = set()
        for position, annotation in enumerate(self.annotations):
            try:
                box = annotation["bbox"]
                if len(box) != 4 or annotation.get("bbox_mode") is None:
                    raise ValueError
                numbers.fromlist(list(box))  # of a tuple or an array
            except (KeyError, TypeError, ValueError, OverflowError):
                self.unread.add(position)
                numbers.extend((0, 0, 0, 0))
        boxes = self.numbers = np.array(numbers).reshape(-1, 4)
        modes = (annotation.get("bbox_mode") for annotation in self.annotations)
        self.are_sizes = np.fromiter((m == BoxMode.XYWH_ABS for m in modes), bool, len(boxes))
        boxes[~self.are_sizes, 2:] -= boxes[~self.are_sizes, :2]
        return boxes, set(self.unread)

    def _clip(self, positions: np.ndarray) -> None:
        """Change nothing: the evaluator reads what the function returns."""

    def _leave_out(self, positions: np.ndarray) -> None:
        """Change nothing, likewise."""

    def _look_at(self, position: int) -> None:
        annotation = self.annotations[position]
        if missing := [key for key in ("bbox", "bbox_mode") if annotation.get(key) is None]:
            wrong = f"{self._name(position)} lacks {' and '.join(missing)}"
        else:
            given, mode = annotation["bbox"], NAMES[annotation["bbox_mode"]]
            if position in self.unread:
                problem: str | None = f"bbox {given!r:.80}, not four numbers"
            else:
                box = self.numbers[position].tolist()
                problem = box_problem(box, [self.heights[position], self.widths[position]])
            if problem is None:
                return
            wrong = f"{self._name(position)} ({mode} {given!r:.80}) has {problem}"
        self.findings.problems.append(Problem("annotations", position, wrong, position))


def _is_looked_at(annotation: dict, evaluation: bool) -> bool:
    mode = annotation.get("bbox_mode")
    if mode is None or "bbox" not in annotation:
        return evaluation or not annotation.get("iscrowd")  # which a training does not read
    return mode in NAMES


def _size(record: dict, key: str) -> int:
    value = record.get(key)
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return UNKNOWN
