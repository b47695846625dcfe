"""Registers the parts of a labelled folder as datasets of Detectron2."""

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ..errors import copies_that_fit
from .contents import Contents, read_folder
from .layouts import PART_NAMES, WHOLE
from .summary import PartSummary, summarize

_COPIES: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


class PreparedPart(NamedTuple):
    """One part: where Detectron2 reads it, and what it holds."""

    json_file: str
    image_root: str
    source_file: str  # of the user; `json_file` may be a copy of it
    summary: PartSummary


class PreparedFolder(NamedTuple):
    """A labelled folder that is ready to be registered; small, and can be pickled."""

    path: str
    layout: str
    classes: dict[int, str]  # category id -> name, in the model's order
    parts: dict[str, PreparedPart]  # "train", "val", "test"; "all" if it is not divided
    held_out: bool
    notes: list[str]
    images: str  # digest of the paths of all images in the folder

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, in the model's order."""
        return list(self.classes.values())

    @property
    def summaries(self) -> dict[str, PartSummary]:
        """The counts of each part."""
        return {key: part.summary for key, part in self.parts.items()}


def prepare_folder(
    path: str | Path, val_share: float | None = 0.2, class_names: list[str] | None = None
) -> PreparedFolder:
    """Read a labelled folder, and write what Detectron2 can't read as it is to temporary files.

    They are removed when this process ends.

    Args:
        path, val_share, class_names: as for `read_folder`, whose errors apply.
    """
    folder = read_folder(path, val_share, class_names)
    parts = {
        key: PreparedPart(
            _write_copy(contents) if contents.changed else str(contents.json_file),
            str(contents.image_root),
            str(contents.json_file),
            summarize(contents.coco),
        )
        for key, contents in folder.parts.items()
    }
    classes = {c["id"]: c["name"] for c in folder.categories}
    return PreparedFolder(
        os.fspath(path),
        folder.layout.name,
        classes,
        parts,
        folder.held_out,
        folder.notes,
        folder.images,
    )


def register_prepared(folder: PreparedFolder) -> dict[str, str]:
    """Register the parts of a folder as `{its name}_train`, `_val`, ..., and return {part: name}.

    Registering a folder again replaces its datasets.
    """
    base = dataset_base(folder.path)
    names = {key: f"{base}_{key}" for key in folder.parts}
    for key, name in names.items():
        _register(name, folder, folder.parts[key])
    return names


def dataset_base(path: str | Path) -> str:
    """Return what the names of a folder's datasets begin with.

    It is the folder's name; with a hash of the path if another dataset has that name already.
    """
    path = Path(path).resolve()
    base = re.sub(r"\W+", "_", path.stem if path.suffix == ".json" else path.name) or "folder"
    for part in (*PART_NAMES, WHOLE):
        name = f"{base}_{part}"
        if name in DatasetCatalog and MetadataCatalog.get(name).get("folder") != str(path):
            return f"{base}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    return base


def _register(name: str, folder: PreparedFolder, part: PreparedPart) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: load_coco_json(part.json_file, part.image_root, name))
    MetadataCatalog.get(name).set(
        json_file=part.json_file,
        image_root=part.image_root,
        evaluator_type="coco",
        folder=str(Path(folder.path).resolve()),
        source_file=part.source_file,
        images=folder.images,
        thing_classes=folder.class_names,
        thing_dataset_id_to_contiguous_id={id: i for i, id in enumerate(folder.classes)},
    )


def _write_copy(contents: Contents) -> str:
    with copies_that_fit(tempfile.gettempdir()):
        if not _COPIES:
            _COPIES.append(tempfile.TemporaryDirectory(prefix="mabn_d2-"))
        scratch = tempfile.mkdtemp(dir=_COPIES[0].name)
        copy = Path(scratch, contents.json_file.name)
        copy.write_text(json.dumps(contents.coco), encoding="utf-8")
    return str(copy)
