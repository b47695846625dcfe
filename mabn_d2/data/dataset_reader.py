"""Reads the datasets of a config and checks each by itself."""

import os
from collections.abc import Callable, Iterable

from detectron2.data import Metadata, MetadataCatalog
from detectron2.utils.file_io import PathManager

from .coco_check import inspect
from .coco_files import CheckedDataset, CheckedFile, leave_out, registered_function
from .coco_findings import Edit, Findings, apply_edits, problems_by_kind, refuse
from .coco_parsing import read_json
from .dataset_summary import DatasetSummary, summarize_records
from .errors import BadAnnotationError, DataError
from .packages import remedy
from .pascal_voc import find_problem
from .record_boxes import RecordCheck
from .requirements import DataRequirements, listed, unique
from .semantic_labels import check_labels

COCO_TYPES = ("coco", "coco_panoptic_seg")  # evaluator types with a COCO instances file
# Evaluator types whose evaluators take predictions by the image_id of a record.
BY_IMAGE_ID = ("coco", "lvis", "pascal_voc")
BUILTIN = ("coco_", "keypoints_coco_", "lvis_", "voc_", "cityscapes_", "ade20k_")


class DatasetReader:
    """Reads the datasets of a config.

    Attributes:
        train, test: the datasets by name, to take the places of the registered ones.
        summaries: what they hold, by name; without datasets whose records are not a list.
        notes: warnings.
    """

    def __init__(self, wanted: DataRequirements):
        self.wanted = wanted
        self.train: dict[str, CheckedDataset] = {}
        self.test: dict[str, CheckedDataset] = {}
        self.summaries: dict[str, DatasetSummary] = {}
        self.notes: list[str] = []
        # Content of files that are used for training and for evaluation.
        self._parsed: dict[str, dict] = {}

    def read(self) -> None:
        """Read all datasets.

        Raises:
            DataError: if one can't be used.
        """
        for name in unique(self.wanted.test.value):
            self.test[name] = self._read(name, self.wanted.test.key, evaluation=True)
        for name in unique(self.wanted.train.value or ()):
            self.train[name] = self._read(name, self.wanted.train.key, evaluation=False)

    def _read(self, name: str, key: str, evaluation: bool) -> CheckedDataset:
        metadata = MetadataCatalog.get(name)
        function = registered_function(name)
        json_file, root = metadata.get("json_file"), metadata.get("image_root")
        is_coco = json_file and root and metadata.get("evaluator_type", "coco") in COCO_TYPES
        if is_coco and ("://" in json_file or os.path.isfile(json_file)):
            return self._read_coco(name, key, function, json_file, os.fspath(root), evaluation)
        records = _call(name, key, function)
        if is_coco and os.path.isfile(json_file):  # the function has made it
            return self._read_coco(name, key, function, json_file, os.fspath(root), evaluation)
        left_out: dict[int, set[int]] = {}
        if isinstance(records, list):  # a torch Dataset is not read before the training
            left_out = self._look_at_records(name, key, records, metadata, evaluation)
        return CheckedDataset(function, records=records, left_out=left_out)

    def _read_coco(
        self,
        name: str,
        key: str,
        function: Callable[[], list[dict]],
        json_file: str,
        root: str,
        evaluation: bool,
    ) -> CheckedDataset:
        wanted = self.wanted
        # For messages: `json_file` may be a copy that the user does not know.
        source = MetadataCatalog.get(name).get("source_file", json_file)
        _check_files(name, key, root, evaluation)
        content = self._parsed.pop(json_file, None) or read_json(json_file)
        masks = wanted.masks.value or (wanted.reads_masks and not evaluation)
        found = inspect(content, source, root, masks=masks, evaluation=evaluation)
        edits, notes = list(found.edits), list(found.notes)
        if evaluation:
            refuse(found.problems, source, "as an evaluation leaves nothing out")
        elif wanted.skip:
            edits += [Edit(problem.key, problem.position, None) for problem in found.problems]
            notes += problems_by_kind(found.problems)
        else:
            refuse(found.problems, source, 'or set DATALOADER.BAD_INPUT to "skip"')
        self.notes += [f"{name} ({source}): {note}" for note in notes]
        _check_names(name, key, found.summary)
        if evaluation and not edits and json_file in _json_files(wanted.train.value or ()):
            self._parsed[json_file] = content
        apply_edits(content, edits)
        if not content["images"]:
            why = f": the first is left out because {found.problems[0]}" if found.problems else ""
            raise BadAnnotationError(f"{source} ({key} {name!r}) has no image{why}: add images")
        found.summary.images = len(content["images"])
        if wanted.num_stuff_classes is not None:
            load = CheckedDataset(function, CheckedFile(json_file, edits, content))
            check_labels(wanted, name, key, _labels(name, key, load), evaluation)
        self.summaries[name] = found.summary
        return CheckedDataset(function, CheckedFile(json_file, edits, content))

    def _look_at_records(
        self, name: str, key: str, records: list[dict], metadata: Metadata, evaluation: bool
    ) -> dict[int, set[int]]:
        """Return the annotations that are left out, as CheckedDataset takes them."""
        if not records:
            raise DataError(f"{key} names {name!r}, which has no images: add some")
        self._look_at_keys(name, key, records, metadata, evaluation)
        boxes, left_out = self._look_at_boxes(name, key, records, evaluation)
        classes = metadata.get("thing_classes")
        records = leave_out(records, left_out)
        summary = summarize_records(records, name, None if classes is None else list(classes))
        summary.objects_with_area -= boxes.objects_without_area()
        self.summaries[name] = summary
        if classes is not None:
            bad = [i for i in summary.class_ids if i not in range(len(classes))]
            if bad:
                raise DataError(
                    f"{key} names {name!r}, which has objects with category_id {bad[0]!r}, but "
                    f"{len(classes)} thing_classes ({listed(classes)}): category_id must be in "
                    f"0..{len(classes) - 1}"
                )
        check_labels(self.wanted, name, key, _labels_of(records), evaluation)
        if self.wanted.skip and not evaluation:
            return left_out  # the loader leaves missing images out and counts them
        files = [record["file_name"] for record in records if "file_name" in record]
        missing = [file for file in files if not PathManager.isfile(file)]
        if missing:
            raise DataError(
                f"{key} names {name!r}, of whose {len(records)} images {len(missing)} do not exist "
                f"({listed(missing, 2)}): correct the paths"
            )
        return left_out

    def _look_at_keys(
        self, name: str, key: str, records: list[dict], metadata: Metadata, evaluation: bool
    ) -> None:
        """Each record has what Detectron2 reads of it, beside what its objects have."""
        needed: list[str] = []
        kind = metadata.get("evaluator_type")
        if evaluation and kind in BY_IMAGE_ID:
            needed = ["image_id"]
            # Without a file the evaluator makes one of the records.
            if kind == "coco" and not metadata.get("json_file"):
                needed += ["file_name", "height", "width"]
        elif not evaluation and self.wanted.num_classes is not None:
            needed = ["annotations"]
            if not any("annotations" in record for record in records):
                return  # said by the comparison with the config
        for position, record in enumerate(records):
            for attribute in needed:
                if record.get(attribute) is None:
                    image = record.get("file_name", record.get("image_id", "no file_name"))
                    empty = "=[] if it has no objects" if attribute == "annotations" else ""
                    raise DataError(
                        f"{key} names {name!r}, whose record {position} ({image}) has no {attribute}: "
                        f"add {attribute if empty else 'it'}{empty}"
                    )

    def _look_at_boxes(
        self, name: str, key: str, records: list[dict], evaluation: bool
    ) -> tuple[RecordCheck, dict[int, set[int]]]:
        findings = Findings(DatasetSummary(name))
        check = RecordCheck(records, findings, evaluation)
        check.inspect()
        left_out: dict[int, set[int]] = {}
        where, what = f"{key} names {name!r}", "bbox or bbox_mode"
        if evaluation:
            refuse(findings.problems, where, "as an evaluation leaves nothing out", what)
        elif self.wanted.skip:
            findings.notes += problems_by_kind(findings.problems)
            for problem in findings.problems:
                index, position = check.places[problem.position].tolist()
                left_out.setdefault(index, set()).add(position)
        else:
            refuse(findings.problems, where, 'or set DATALOADER.BAD_INPUT to "skip"', what)
        self.notes += [f"{name}: {note}" for note in findings.notes]
        return check, left_out


def check_builtin(name: str, key: str) -> None:
    """Raise DataError if the file of one of Detectron2's own datasets is not there.

    Others may be made by their functions when they are read.
    """
    json_file = MetadataCatalog.get(name).get("json_file")
    if name.startswith(BUILTIN) and json_file and not PathManager.exists(json_file):
        raise DataError(
            f"{key} names {name!r}, which needs {json_file}, which does not exist: {_remedy(name)}"
        )


def _call(name: str, key: str, function: Callable[[], list[dict]]) -> list[dict]:
    try:
        return function()
    except DataError:
        raise
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise DataError(
            f"{key} names {name!r}, which can't be loaded without the package {package}: "
            f"{remedy(package)}"
        ) from error
    except Exception as error:  # the function may be the user's, and raise anything
        problem = find_problem(MetadataCatalog.get(name))
        if problem:
            raise DataError(f"{key} names {name!r}, which can't be loaded: {problem}") from error
        reason = " ".join(str(error).split()) or "no message"
        raise DataError(
            f"{key} names {name!r}, which can't be loaded ({type(error).__name__}: {reason}): "
            f"{_remedy(name)}"
        ) from error


def _check_files(name: str, key: str, root: str, evaluation: bool) -> None:
    """The image folder is there, and what panoptic datasets have beside the instances file."""
    metadata = MetadataCatalog.get(name)
    needed = [root, metadata.get("sem_seg_root")]
    if evaluation:
        needed += [metadata.get("panoptic_json"), metadata.get("panoptic_root")]
    for path in needed:
        if path and "://" not in str(path) and not os.path.exists(path):
            raise DataError(
                f"{key} names {name!r}, which needs {path}, which does not exist: {_remedy(name)}"
            )


def _labels(name: str, key: str, load: Callable[[], list[dict]]) -> list[str]:
    """Return the pictures of labels of a dataset that Detectron2 merges from objects and labels."""
    try:
        return _labels_of(load())
    except (AssertionError, KeyError) as error:
        raise DataError(
            f"{key} names {name!r}, whose images and labels ({MetadataCatalog.get(name).sem_seg_root}) "
            f"don't fit ({type(error).__name__} {error}): each image needs a picture of labels of its "
            "name, and Detectron2 finds them for .jpg images only"
        ) from error


def _labels_of(records: list[dict]) -> list[str]:
    return [r["sem_seg_file_name"] for r in records if "sem_seg_file_name" in r]


def _check_names(name: str, key: str, summary: DatasetSummary) -> None:
    """Detectron2 sets thing_classes from the file, and fails if they are set otherwise."""
    given = MetadataCatalog.get(name).get("thing_classes")
    if given is not None and list(given) != summary.classes:
        raise DataError(
            f"{key} names {name!r}, whose thing_classes are ({listed(given)}), but {summary.source} "
            f"has the categories ({listed(summary.classes or ())}): register it without "
            "thing_classes, or with those of the file"
        )


def _json_files(names: Iterable[str]) -> set[str]:
    return {MetadataCatalog.get(name).get("json_file") for name in names}


def _remedy(name: str) -> str:
    if name.startswith(BUILTIN):
        root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
        return f"download it to {root!r}, or set DETECTRON2_DATASETS to the folder that has it"
    return "correct the path or the function that was registered"
