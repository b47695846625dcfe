"""Hands parsed and corrected COCO files to Detectron2, so that each is parsed only once.

Detectron2 gets the records of a dataset from a function in its catalog, and evaluators read the JSON
file again. A `CheckedDataset` takes the place of that function: the first call uses what the check has
parsed. Where an evaluation needs corrections, a corrected copy takes the place of the file.
"""

import contextlib
import json
import marshal
import os
from collections.abc import Callable, Iterator
from typing import IO, Any

from detectron2.data import DatasetCatalog
from detectron2.utils.file_io import PathHandler, PathManager

from .coco_findings import Edit, apply_edits
from .coco_parsing import local_path, paused_gc, read_json
from .errors import copies_that_fit


class CheckedFile:
    """A COCO file that has been checked.

    Args:
        path: of the JSON file.
        edits: the corrections that it needs.
        content: the parsed and corrected content, if this process has parsed it.
        shared: path of a copy of `content` for the other processes of this machine, or None.
    """

    def __init__(
        self,
        path: str,
        edits: list[Edit],
        content: dict | None = None,
        shared: str | None = None,
    ):
        self.path, self.edits, self.content, self.shared = path, edits, content, shared

    def share(self, folder: str) -> None:
        """Write the content to a file in `folder` that is read several times faster than JSON."""
        self.shared = os.path.join(folder, f"{abs(hash(self.path))}.marshal")
        with copies_that_fit(folder), open(self.shared, "wb") as file:
            marshal.dump(self.content, file)

    def for_other_process(self) -> "CheckedFile":
        """Return what another process of this machine needs; it is small and can be pickled."""
        return CheckedFile(self.path, self.edits, shared=self.shared)

    def take(self) -> dict:
        """Return the corrected content; the caller owns it and may change it."""
        content, self.content = self.content, None
        if content is not None:
            return content
        if self.shared is not None:
            with open(self.shared, "rb") as file, paused_gc():
                return marshal.load(file)
        content = read_json(self.path)
        apply_edits(content, self.edits)
        return content


class CheckedDataset:
    """The function in Detectron2's catalog for a dataset that has been checked.

    Args:
        load: the function that was registered.
        file: the COCO file that it reads, or None.
        records: what it has returned to the check, for the first call, or None.
        left_out: {position of a record: positions of its annotations} that can't be used.
    """

    def __init__(
        self,
        load: Callable[[], list[dict]],
        file: CheckedFile | None = None,
        records: list[dict] | None = None,
        left_out: dict[int, set[int]] | None = None,
    ):
        self.load, self.file, self.records = load, file, records
        self.left_out = left_out or {}

    def __call__(self) -> list[dict]:
        """Return the records of the dataset, in Detectron2's format."""
        if self.file is None:
            records, self.records = self.records, None
            return leave_out(self.load() if records is None else records, self.left_out)
        with _parsed(self.file), paused_gc():
            return self.load()

    def replace(self, name: str) -> None:
        """Take the place of the function of a dataset."""
        DatasetCatalog.pop(name)
        DatasetCatalog.register(name, self)


def leave_out(records: list[dict], places: dict[int, set[int]]) -> list[dict]:
    """Return records without the annotations at {position of the record: their positions}.

    The records themselves stay as they are, because a function may return them again.
    """
    if not places:
        return records
    corrected = list(records)
    for index, positions in places.items():
        kept = [a for i, a in enumerate(records[index]["annotations"]) if i not in positions]
        corrected[index] = {**records[index], "annotations": kept}
    return corrected


def registered_function(name: str) -> Callable[[], list[dict]]:
    """Return the function that was registered for a dataset, also if it has been checked since."""
    function = DatasetCatalog[name]
    return function.load if isinstance(function, CheckedDataset) else function


@contextlib.contextmanager
def _parsed(file: CheckedFile) -> Iterator[None]:
    """Let `load_coco_json`, which imports pycocotools' COCO when it is called, use parsed content."""
    from pycocotools import coco

    original: Any = coco.COCO

    class ParsedCOCO(original):
        def __init__(self, annotation_file: str | None = None) -> None:
            ours = annotation_file is not None and _same(annotation_file, file.path)
            super().__init__(None if ours else annotation_file)
            if ours:
                self.dataset = file.take()
                self.createIndex()

    coco.COCO = ParsedCOCO
    try:
        yield
    finally:
        coco.COCO = original
        file.content = None  # the function may have read something else


def _same(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(local_path(other))


def write_corrected(path: str, content: dict, folder: str) -> str:
    """Write corrected content to a JSON file in `folder`, and return its path."""
    copy = os.path.join(folder, f"{abs(hash(path))}-{os.path.basename(path)}")
    with copies_that_fit(folder), open(copy, "w", encoding="utf-8") as file:
        file.write(json.dumps(content))
    return copy


def read_copy_instead(path: str, copy: str) -> None:
    """Have Detectron2 read `copy` in the place of the file `path`."""
    PathManager.register_handler(_Replaced(path, copy), allow_override=True)


class _Replaced(PathHandler):
    """Lets Detectron2 read a corrected copy of a file."""

    def __init__(self, file: str, copy: str):
        super().__init__()
        self.file, self.copy = file, copy

    def _get_supported_prefixes(self) -> list[str]:
        return [self.file]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return self.copy if path == self.file else path

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return os.path.isfile(path)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return os.path.exists(path)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        return open(self._get_local_path(path), mode, buffering, **kwargs)
