"""Detectron2's checkpointer, which reads without running code and leaves no half-written file."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import nn

from ..layers import BatchRenorm2d
from ..layers.mabn import MISFIT, MABN2d
from .io import CheckpointError, atomic_file, read_checkpoint, write_checkpoint
from .record import FROM_BATCH_NORM, KEY, check_recalibrated, needs_recalibration
from .state import convert_batch_norms, tensors, wrapper
from .weights_check import (
    batch_norms_for_mabn,
    check_entries,
    check_norms,
    check_values,
    is_mabn,
)

_logger = logging.getLogger(__name__)


@contextmanager
def _one_line_of_misfits(source: str) -> Iterator[None]:
    """Log how many MABN layers start with empty windows in one line, not in one for each layer."""
    misfits: list[Any] = []

    def collect(record: logging.LogRecord) -> bool:
        if record.msg != MISFIT:
            return True
        misfits.append(record.args)
        return False

    logger = logging.getLogger(MABN2d.__module__)
    logger.addFilter(collect)
    try:
        yield
    finally:
        logger.removeFilter(collect)
    if misfits:
        _logger.warning(f"{source}: {MISFIT % misfits[0]}, in {len(misfits)} layers")


def _start_norm_schedules(model: nn.Module) -> None:
    """Let the schedules of MABN and BRN begin with the next forward; running statistics stay.

    Weights may bring the windows and the counter of the run that they are from: the warm-up and the
    clipping of a new run would be over before it starts.
    """
    for module in model.modules():
        if isinstance(module, MABN2d):
            module.reset_windows()
        elif isinstance(module, BatchRenorm2d):
            module.num_batches_tracked.zero_()


class SafeCheckpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` for files from anyone and disks that fill up.

    - `read_checkpoint` reads all formats and runs no code. Detectron2 itself unpickles a `.pkl` as it
      is, and so runs whatever the file says.
    - Weights that do not belong to the model are refused before any of them is loaded
      (`weights_check.py`): BatchNorm for MABN, MABN for another norm, values that are not finite,
      files of which nothing fits. One line says what is loaded and what starts anew.
    - A checkpoint gets its name once it is whole and on the disk, and `last_checkpoint` names it
      only then. A crash, a full disk or a missing permission leaves the older ones as they are. The
      next save removes what a killed process has left half-written.

    After `load`, `record` is what this package's converters wrote into the file (`record.py`), or
    None, `converted` lists the norms that were converted while loading, and `loaded` is the rest of
    the file. `save` adds `description` (`description.py`) and `extra` to the file. `before_resume`, if
    set, is called with the file of a run that is resumed before anything of it is loaded. Folders
    that are not local are written by their own handlers of Detectron2's PathManager.

    Args:
        model: the model to load into and to save.
        save_dir: where `save` writes.
        complete: whether a file must have all of the model's entries, as for an evaluation.
        convert_batch_norm: convert BatchNorm to MABN while loading, instead of refusing it. Centres
            the filters and folds the means; the caller must recalibrate the norms in `converted`.
        save_to_disk, checkpointables: as in Detectron2.
    """

    description: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        complete: bool = False,
        convert_batch_norm: bool = False,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.complete, self.convert_batch_norm = complete, convert_batch_norm
        self.record: dict[str, Any] | None = None
        self.converted: list[str] = []
        self.loaded: dict[str, Any] = {}
        self.extra: dict[str, Any] = {}
        self.before_resume: Callable[[dict[str, Any]], None] | None = None
        self._source, self._resumes = "", False

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As Detectron2's. A run that is resumed needs all entries of its checkpoint.

        In a run that resumes no other one the schedules of MABN and BRN start over.
        """
        self._resumes = resume and self.has_checkpoint()
        try:
            checkpoint = super().resume_or_load(path, resume=resume)
            # A file of this package's converters has the windows on purpose, if at all.
            if not self._resumes and self.record is None:
                _start_norm_schedules(self.model)
            return checkpoint
        finally:
            self._resumes = False

    @property
    def needs_recalibration(self) -> bool:
        """Whether the loaded `running_var` is a BatchNorm's, converted by this load or in the file."""
        return bool(self.converted) or needs_recalibration(self.record)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file as Detectron2 does, after a check.

        Raises:
            CheckpointError: for a file that is damaged, refused, or does not belong to the model.
        """
        if not path and self.complete:
            raise CheckpointError(
                "no weights to evaluate: set MODEL.WEIGHTS (in a LazyConfig train.init_checkpoint), "
                "or add --resume for the last checkpoint of OUTPUT_DIR"
            )
        self._parsed_url_during_load = None  # Detectron2 leaves it after a load that failed
        self._source, self.converted = str(path), []
        try:
            checkpoint = super().load(path, *args, **kwargs)
        except (AssertionError, OSError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"can't read {path}: {text}; correct the path") from error
        self.loaded = checkpoint
        record = checkpoint.get(KEY)
        self.record = record if isinstance(record, dict) else None
        if self.complete:
            check_recalibrated(self.record, path)
        elif needs_recalibration(self.record):
            _logger.warning(
                f"{path} {FROM_BATCH_NORM}: Trainer and the LazyConfig tool recalibrate it before "
                "they train"
            )
        return checkpoint

    def _load_file(self, filename: str) -> dict[str, Any]:
        if not filename.endswith((".pkl", ".pyth")):
            try:
                return super()._load_file(filename)  # which calls _torch_load
            except CheckpointError:
                raise
            except ValueError as error:
                raise CheckpointError(
                    f'{self._source}: behind "?" only matching_heuristics=True is known: correct it'
                ) from error
        # As Detectron2 does, but for the reading.
        data = self._torch_load(filename)
        if filename.endswith(".pyth"):
            weights, author, left_out = data.get("model_state"), "pycls", "num_batches_tracked"
        elif "model" in data and "__author__" in data:
            return data
        else:
            weights, author, left_out = data.get("blobs", data), "Caffe2", "_momentum"
        if not isinstance(weights, dict):
            raise CheckpointError(f"{filename} holds no state dict of {author}: use another file")
        weights = {k: v for k, v in weights.items() if not k.endswith(left_out)}
        return {"model": weights, "__author__": author, "matching_heuristics": True}

    def _torch_load(self, filename: str) -> dict[str, Any]:
        data = read_checkpoint(filename)
        if not isinstance(data, dict) or not isinstance(data.get("model", {}), dict):
            raise CheckpointError(f"{filename} holds no state dict: it is no checkpoint")
        key = None if filename.endswith((".pkl", ".pyth")) else wrapper(data)
        if key not in (None, "model"):
            data["model"] = data.pop(key)
        return data

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if self._resumes and self.before_resume is not None:
            self.before_resume(checkpoint)
        state = tensors(checkpoint["model"])
        norms = [name for name, norm in self.model.named_modules() if is_mabn(norm)]
        if checkpoint.pop("matching_heuristics", False):
            # With the means that MABN lacks, and a norm behind each convolution that has none, so that
            # they are found in the file by their names.
            expected = self.model.state_dict()
            expected = {
                f"{name.removesuffix('.weight')}.norm.weight": value[:, 0, 0, 0]
                for name, value in expected.items()
                if name.endswith(".weight") and value.dim() == 4
            } | expected
            expected |= {f"{name}.running_mean": expected[f"{name}.running_var"] for name in norms}
            try:
                state = align_and_update_state_dicts(
                    expected, state, c2_conversion=checkpoint.get("__author__") == "Caffe2"
                )
            except ValueError as error:
                raise CheckpointError(f"{self._source}: {error}") from error
        for name in norms:  # The published layers have (1, C, 1, 1).
            for entry in ("weight", "bias", "running_var"):
                value = state.get(f"{name}.{entry}")
                if value is not None and value.shape == (1, value.numel(), 1, 1):
                    state[f"{name}.{entry}"] = value.reshape(-1)
        if self.convert_batch_norm and not self._resumes:
            state = self._convert(state)
        check_norms(self.model, state, self._source)
        check_values(self.model, state, self._source)
        complete = self.complete or self._resumes
        _logger.info(check_entries(self.model, state, self._source, complete))
        checkpoint["model"] = state
        with _one_line_of_misfits(self._source), warnings.catch_warnings():
            # Loading into a model without data, to check, does nothing.
            warnings.filterwarnings("ignore", ".*non-meta parameter in the checkpoint")
            return super()._load_model(checkpoint)

    def _convert(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert the BatchNorms that the model has MABN for."""
        self.converted = batch_norms_for_mabn(self.model, state)
        if not self.converted:
            return state
        if self.complete:
            raise CheckpointError(
                f"{self._source} has BatchNorm where the model has MABN: an evaluation needs weights "
                "that were trained with MABN; convert them while training, which recalibrates them"
            )
        _logger.warning(
            f"{self._source}: {len(self.converted)} BatchNorms BECOME MABN: their filters are centred "
            "and their means folded, which changes what the model computes; running_var is "
            "recalibrated on training images before the first iteration"
        )
        return convert_batch_norms(state, self.converted)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Nothing: `check_entries` has logged it in one line."""

    def save(self, name: str, tag: bool = True, **kwargs: Any) -> None:
        """Save to `{name}.pth` as DetectionCheckpointer does.

        Args:
            name: file name without its suffix.
            tag: let `last_checkpoint` name the file, so that a resumed run goes on from it.
            kwargs: more entries of the file.

        Raises:
            CheckpointError: if the file can't be written.
        """
        kwargs = {**self.description, **self.extra, **kwargs}
        if "://" in self.save_dir or not self.save_dir or not self.save_to_disk:
            return super().save(name, **kwargs)
        data = {"model": self.model.state_dict()}
        data |= {key: value.state_dict() for key, value in self.checkpointables.items()} | kwargs
        path = Path(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        for partial in path.parent.glob(".*.partial"):
            partial.unlink()
        write_checkpoint(data, path)
        if tag:
            self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if "://" in self.save_dir:
            return super().tag_last_checkpoint(last_filename_basename)
        with atomic_file(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())
