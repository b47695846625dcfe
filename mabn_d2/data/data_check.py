"""Checks the datasets of a config in the first process of each machine, for all of its processes."""

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from .coco_files import (
    CheckedDataset,
    CheckedFile,
    read_copy_instead,
    registered_function,
    write_corrected,
)
from .comparison import compare
from .dataset_reader import DatasetReader, check_builtin
from .errors import DataError, did_you_mean
from .requirements import DataRequirements, unique

SECONDS_TO_SPEAK = 5.0  # for the process that prints an error, before the others end

# The state of the datasets when they were checked, and how many images are trained on.
_checked: dict[DataRequirements, tuple[list, dict[str, int]]] = {}
_folders: list[TemporaryDirectory] = []  # of copies; removed when this process ends


@dataclass
class _Outcome:
    """What the first process of a machine tells the others.

    Attributes:
        error: why the data can't be used, or None.
        files: the COCO file of each training set.
        left_out: annotations of training sets without a file, as CheckedDataset leaves them out.
        copies: JSON files and the corrected copies that take their places.
        images: how many images of each training set are trained on.
    """

    error: DataError | None = None
    files: dict[str, CheckedFile] = field(default_factory=dict)
    left_out: dict[str, dict[int, set[int]]] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)


def check_requirements(wanted: DataRequirements) -> dict[str, int]:
    """Check the datasets of a config; all processes must call this together.

    Doubtful data is logged as a warning. Training sets are kept as they were parsed until Detectron2
    reads them. A check with the same requirements is not repeated while the datasets stay the same.

    Returns:
        How many images of each training set are trained on; without sets that are not known.
    Raises:
        DataError: if the data can't be used or contradicts the config. Its `said_elsewhere` is True
            if another process reports it.
    """
    local_rank = comm.get_local_rank()
    outcome, unexpected = None, None
    if local_rank == 0:
        try:
            outcome = _check_here(wanted, share=comm.get_local_size() > 1)
        except DataError as error:
            outcome = _Outcome(error)
        except Exception as error:  # of any kind: the others would wait for ever
            unexpected = error
            outcome = _Outcome(DataError(f"the check failed: {type(error).__name__}: {error}"))
    outcomes = comm.all_gather(outcome)
    if unexpected is not None:
        raise unexpected
    own = outcomes[comm.get_rank() - local_rank]
    refusal = own.error or next((o.error for o in outcomes if o and o.error), None)
    if refusal is not None:
        refusal.said_elsewhere = local_rank > 0 or own.error is None
        if refusal.said_elsewhere:
            time.sleep(SECONDS_TO_SPEAK)  # a launcher ends all processes when the first one ends
        raise refusal
    if local_rank > 0:
        for name, file in own.files.items():
            CheckedDataset(registered_function(name), file).replace(name)
        for name, places in own.left_out.items():
            CheckedDataset(registered_function(name), left_out=places).replace(name)
        for path, copy in own.copies.items():
            read_copy_instead(path, copy)
    return own.images


def _check_here(wanted: DataRequirements, share: bool) -> _Outcome:
    """Check in this process, and return what the others need."""
    check_names(wanted)
    state, images = _checked.get(wanted, (None, {}))
    if state == _state(wanted):
        return _Outcome(images=images)
    reader = DatasetReader(wanted)
    reader.read()
    notes = [*reader.notes, *compare(wanted, reader.summaries)]
    outcome = _Outcome()
    for name, dataset in reader.train.items():
        if dataset.file is not None:
            if share:
                dataset.file.share(_new_folder())
            outcome.files[name] = dataset.file.for_other_process()
        elif dataset.left_out:
            outcome.left_out[name] = dataset.left_out
        dataset.replace(name)
    for name, dataset in reader.test.items():
        file = dataset.file
        if file is not None and file.edits:
            # In a file, because evaluators read it themselves.
            outcome.copies[file.path] = write_corrected(file.path, file.take(), _new_folder())
            read_copy_instead(file.path, outcome.copies[file.path])
        elif wanted.train.value is None:  # it is evaluated at once
            dataset.replace(name)
    for note in notes:
        logging.getLogger(__name__).warning(note)
    for name in reader.train:
        if (summary := reader.summaries.get(name)) is not None:
            filtered = wanted.filter_empty.value and summary.annotated
            outcome.images[name] = summary.images_with_objects if filtered else summary.images
    _checked[wanted] = _state(wanted), outcome.images
    return outcome


def check_names(wanted: DataRequirements) -> None:
    """Check, without reading them, that the datasets and the files of proposals are there.

    Raises:
        DataError: if a dataset is not registered, or is one of Detectron2's own whose file is not
            there, or if a file of proposals is missing.
    """
    for setting in (wanted.test, wanted.train):
        if problem := not_registered(setting.key, setting.value or ()):
            raise DataError(problem)
        for name in setting.value or ():
            check_builtin(name, setting.key)
    for setting, sets in wanted.proposals:
        if len(setting.value) != len(sets.value):
            raise DataError(
                f"{setting}, {len(setting.value)} files for the {len(sets.value)} datasets of "
                f"{sets.key}: name one file for each, or set MODEL.LOAD_PROPOSALS False"
            )
        for file in setting.value:
            if not PathManager.isfile(file):
                raise DataError(f"{setting}, but {file!r} does not exist: correct the path")


def not_registered(key: str, names: Iterable[str]) -> str | None:
    """Return what is wrong with the datasets that a key names, and the remedy; None if all are registered."""
    for name in names:
        if name not in DatasetCatalog:
            known = sorted(DatasetCatalog.list())
            return (
                f"{key} names {name!r}, which is not registered{did_you_mean(name, known)}: use one of "
                f"{', '.join(known[:3])}, ... or register it at import"
            )
    return None


def _state(
    wanted: DataRequirements,
) -> list[tuple[str, Callable[[], list[dict]], tuple[int, int] | None]]:
    """Return what changes if a dataset is registered again or its file is changed."""
    state = []
    for name in unique([*(wanted.train.value or ()), *wanted.test.value]):
        json_file = MetadataCatalog.get(name).get("json_file")
        try:
            status = os.stat(json_file) if json_file else None
        except OSError:
            status = None
        written = status and (status.st_mtime_ns, status.st_size)
        state.append((name, DatasetCatalog[name], written))
    return state


def _new_folder() -> str:
    _folders.append(TemporaryDirectory(prefix="mabn_d2-"))
    return _folders[-1].name
