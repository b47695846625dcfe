"""Registers the parts of a labelled folder as datasets of Detectron2."""

import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from .contents import Contents, LabelledFolder, read_folder
from .layouts import PART_NAMES, WHOLE
from .summary import PartSummary, summarize

_COPIES: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


class Registered(NamedTuple):
    """What `register_folder` did."""

    folder: LabelledFolder
    summaries: dict[str, PartSummary]  # of each part
    names: dict[str, str]  # of each part: the dataset's
    class_names: list[str]


def register_folder(
    path: str | Path, val_share: float | None = 0.2, class_names: list[str] | None = None
) -> Registered:
    """Register the parts of a labelled folder as `{folder's name}_train`, `_val`, `_test`.

    A part whose file Detectron2 can read as it is stays where it is; others are read from a copy in a
    temporary folder of this process. Registering again replaces the datasets.

    Args:
        path, val_share, class_names: as for `read_folder`, whose errors apply.
    """
    folder = read_folder(path, val_share, class_names)
    base, names, summaries = dataset_base(path), {}, {}
    for key, contents in folder.parts.items():
        names[key] = f"{base}_{key}"
        summaries[key] = summarize(contents.coco)
        _register(names[key], contents, folder, str(Path(path).resolve()))
    return Registered(folder, summaries, names, [c["name"] for c in folder.categories])


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


def _register(name: str, contents: Contents, folder: LabelledFolder, path: str) -> None:
    json_file = _write_copy(contents) if contents.changed else str(contents.json_file)
    image_root = str(contents.image_root)
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: load_coco_json(json_file, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        folder=path,
        source_file=str(contents.json_file),
        thing_classes=[c["name"] for c in folder.categories],
        thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(folder.categories)},
    )


def _write_copy(contents: Contents) -> str:
    if not _COPIES:
        _COPIES.append(tempfile.TemporaryDirectory(prefix="mabn_d2-"))
    scratch = tempfile.mkdtemp(dir=_COPIES[0].name)
    copy = Path(scratch, contents.json_file.name)
    copy.write_text(json.dumps(contents.coco), encoding="utf-8")
    return str(copy)
