"""The output folder of a classifier's training: checks, checkpoints, logs."""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from ..checkpoint.io import CheckpointError, atomic_file, check_writable, read_checkpoint
from ..checkpoint.state import unwrap
from ..modeling.norm_table import parse_norm_options

CHECKPOINT = "checkpoint.pth"

# Arguments that may change on resume; any other change is an error.
MAY_CHANGE = {
    "data",
    "output",
    "checkpoint",
    "device",
    "workers",
    "strict",
    "resume",
    "test_only",
    "log_period",
    "checkpoint_period",
}


def check_output(args: Namespace) -> None:
    """Raise ValueError, before data is read, if --output can't be written to or holds a run.

    The folder is not created: nothing is written before the data is checked.
    """
    folder = Path(args.output)
    try:
        check_writable(folder)
    except OSError as error:
        raise ValueError(f"--output {folder} can't be written to: {error.strerror}") from error
    if args.resume == "no" and (folder / CHECKPOINT).exists():
        raise ValueError(
            f"--output {folder} holds a run: add --resume auto to go on with it, or name another"
        )


def load_checkpoint(model: nn.Module, path: str | Path, args: Namespace) -> dict:
    """Load a checkpoint of a training, or any state dict of the same network.

    Args:
        model: gets the weights.
        path: of the file.
        args: `arch`, `norm`, `bgr255` and `norm_option` of the command line.

    Returns:
        Everything that the file holds.

    Raises:
        CheckpointError: if the file is of another architecture, norm, input or eps, or does not fit.
    """
    checkpoint = read_checkpoint(path)
    state, _ = unwrap(checkpoint)
    for key in ("arch", "norm"):
        saved = checkpoint.get(key)
        if isinstance(saved, str) and saved != getattr(args, key):
            raise CheckpointError(f"{path} is of --{key} {saved}, not {getattr(args, key)}")
    _check_same_function(checkpoint.get("args"), path, args)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise CheckpointError(
            f"{path} does not fit --arch {args.arch} --norm {args.norm} and the classes of --data: "
            + " ".join(line.strip() for line in lines[1:4])[:400]
        ) from error
    return checkpoint


def _check_same_function(saved: object, path: str | Path, args: Namespace) -> None:
    """Raise CheckpointError if weights of a training would compute something else here.

    Args:
        saved: the arguments of that training; other files may have none.
        path: of the file.
        args: `bgr255` and `norm_option` of the command line.
    """
    if not isinstance(saved, Mapping) or not {"bgr255", "norm_option"} <= saved.keys():
        return
    if saved["bgr255"] != args.bgr255:
        raise CheckpointError(
            f"{path} was trained {'with' if saved['bgr255'] else 'without'} --bgr255: "
            f"{'add' if saved['bgr255'] else 'leave out'} --bgr255"
        )
    # The other options of norms matter in the training only.
    was, now = (parse_norm_options(o).get("eps") for o in (saved["norm_option"], args.norm_option))
    if was != now:
        raise CheckpointError(
            f"{path} was trained with --norm-option eps={was or 'its default'}, not "
            f"{now or 'its default'}: give the same"
        )


def check_class_names(checkpoint: Mapping, path: str | Path, classes: Sequence[str]) -> None:
    """Check that a checkpoint's classes are those of the data, in the same order.

    A checkpoint without names, such as the published weights, is taken as it is.

    Raises:
        CheckpointError: if they differ; the outputs would be of other classes.
    """
    saved = checkpoint.get("classes")
    if saved is None or list(saved) == list(classes):
        return
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise CheckpointError(f"{path}: its entry 'classes' is no list of names; use another file")
    index = next(
        (i for i, (a, b) in enumerate(zip(saved, classes)) if a != b),
        min(len(saved), len(classes)),
    )
    names = [repr(x[index]) if index < len(x) else "nothing" for x in (saved, classes)]
    raise CheckpointError(
        f"{path} was trained on {len(saved)} classes and --data has {len(classes)}; class {index} is "
        f"{names[0]} there and {names[1]} here: test it on folders of the same names"
    )


def check_resume(checkpoint: Mapping, path: Path, settings: Mapping[str, object]) -> None:
    """Raise CheckpointError unless the checkpoint is of a run with the same settings."""
    if missing := {"optimizer", "iteration", "result", "args"} - checkpoint.keys():
        raise CheckpointError(
            f"{path} can't be resumed, it lacks {', '.join(sorted(missing))}: start from its "
            "weights by --checkpoint, with another --output"
        )
    saved = checkpoint["args"]
    names = {"processes": "processes", "train_images": "training images"}  # no arguments
    other = [
        f"{names.get(name, '--' + name.replace('_', '-'))} {saved[name]}, not {value}"
        for name, value in settings.items()
        if name not in MAY_CHANGE and name in saved and saved[name] != value
    ]
    if other:
        raise CheckpointError(
            f"{path} is of a run with {'; '.join(other)}: go on with its settings, or name another "
            "--output"
        )


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    result: dict | None,
    settings: Mapping[str, object],
    classes: Sequence[str],
) -> None:
    """Write the checkpoint of a run, whole or not at all.

    Args:
        folder: of the run.
        model: without its wrapper for several processes.
        optimizer: of the model.
        iteration: iterations that are done.
        result: of the last test.
        settings: arguments of the command line, numbers of processes and of training images.
        classes: names of the classes, in the order of the model's outputs.
    """
    with atomic_file(folder / CHECKPOINT) as file:
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "iteration": iteration,
                "arch": settings["arch"],
                "norm": settings["norm"],
                "result": result,
                "args": dict(settings),
                "classes": list(classes),
            },
            file,
        )


class Log:
    """log.json, with one object a line, and TensorBoard; written by rank 0 only."""

    def __init__(self, folder: Path, rank: int):
        self.writer = None
        if rank == 0:
            for partial in folder.glob(f".{CHECKPOINT}.*.partial"):  # of a run that was killed
                partial.unlink()
            folder.mkdir(parents=True, exist_ok=True)
            self.path, self.writer = folder / "log.json", SummaryWriter(folder)

    def write(self, iteration: int, values: Mapping[str, object]) -> None:
        """Write numbers of an iteration; lists are written to log.json only."""
        if self.writer is None:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        for name, value in values.items():
            if not isinstance(value, list):
                self.writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Write what TensorBoard has not written yet."""
        if self.writer is not None:
            self.writer.close()
