"""Detectron2's checkpointer, which reads without running code and leaves no half-written file."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from .io import CheckpointError, atomic_file, read_checkpoint, write_checkpoint
from .record import KEY


class SafeCheckpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` for files from anyone and disks that fill up.

    - All formats are read by `read_checkpoint`: Detectron2 unpickles a `.pkl` as it is, and so runs
      whatever it says.
    - A checkpoint takes its name once it is whole and on the disk, and `last_checkpoint` names it
      only then; a crash, a full disk or a missing permission leaves the older ones as they are.
      What a killed process has left half-written is removed by the next save.

    After `load`, `record` is what the converters of this package wrote into the file (`record.py`),
    or None. `description` is what `save` adds to the file (`description.py`). Folders that are no local ones are written by their own handlers of Detectron2's
    PathManager.
    """

    record = None
    description: Mapping[str, Any] = MappingProxyType({})

    def load(self, path, *args, **kwargs):
        """As Detectron2's; CheckpointError for a file that is damaged or refused."""
        self._parsed_url_during_load = None  # Detectron2 leaves it after a load that failed
        checkpoint = super().load(path, *args, **kwargs)
        record = checkpoint.get(KEY)
        self.record = record if isinstance(record, dict) else None
        return checkpoint

    def _load_file(self, filename):
        if not filename.endswith((".pkl", ".pyth")):
            return super()._load_file(filename)  # which calls _torch_load
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

    def _torch_load(self, filename):
        data = read_checkpoint(filename)
        if not isinstance(data, dict) or not isinstance(data.get("model", {}), dict):
            raise CheckpointError(f"{filename} holds no state dict: it is no checkpoint")
        return data

    def save(self, name, **kwargs):
        """Save to `{name}.pth` as DetectionCheckpointer does; CheckpointError if that fails."""
        kwargs = {**self.description, **kwargs}
        if "://" in self.save_dir or not self.save_dir or not self.save_to_disk:
            return super().save(name, **kwargs)
        data = {"model": self.model.state_dict()}
        data |= {key: value.state_dict() for key, value in self.checkpointables.items()} | kwargs
        path = Path(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        for partial in path.parent.glob(".*.partial"):
            partial.unlink()
        write_checkpoint(data, path)
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename):
        if "://" in self.save_dir:
            return super().tag_last_checkpoint(last_filename_basename)
        with atomic_file(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())
