"""The model of a config and its weights, checked without data before anything is trained or written."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

from ..checkpoint import CheckpointError, SafeCheckpointer
from ..data.errors import one_line
from ..modeling.norm import BUILD_ERRORS, build_model
from .errors import ConfigError
from .hooks.log_statistics import norms_to_watch

_checked: set[tuple[str, bool, bool]] = (
    set()
)  # so that a second look at the same config in this process costs nothing


def check_model(cfg: CfgNode, resume: bool = False, train: bool = True) -> None:
    """Build the model without data, and compare the weights that a run would start from with it.

    Args:
        resume: weights come from OUTPUT_DIR if a checkpoint is there.
        train: False where the config is for evaluation only; all weights must be there then.
    Raises:
        ConfigError: if no model can be built from the config.
        CheckpointError: if the weights do not belong to it.
    """
    key = (cfg.dump(), resume, train)
    if key in _checked:
        return
    model = build_without_data(cfg)
    if train and cfg.MODEL.MABN.LOG_PERIOD > 0:
        try:
            norms_to_watch(model, cfg.MODEL.MABN.LOG_LAYERS)
        except ValueError as error:
            raise ConfigError(
                f"MODEL.MABN.LOG_LAYERS: {error}: correct it, or set MODEL.MABN.LOG_PERIOD 0"
            ) from error
    weights, convert = cfg.MODEL.WEIGHTS, cfg.MODEL.MABN.CONVERT_WEIGHTS
    check_weights(model, weights, cfg.OUTPUT_DIR, resume, train, convert)
    _checked.add(key)


def build_without_data(cfg: CfgNode) -> nn.Module:
    """Return the model of `cfg`, as `without_data` builds it.

    Raises:
        ConfigError: if no model can be built.
    """

    def build(device: str) -> nn.Module:
        moved = cfg.clone()
        moved.defrost()
        moved.MODEL.DEVICE = device
        return build_model(moved)

    return without_data(build, cfg.MODEL)


def without_data(
    build: Callable[[str], nn.Module], node: Mapping, prefix: str = "MODEL."
) -> nn.Module:
    """Return a model on the meta device, shapes only; on the CPU if its constructor needs data.

    ViT, Swin and MViT read their drop rates from a tensor.

    Args:
        build: from a device to the model.
        node, prefix: as in `build_errors`.
    Raises:
        ConfigError: if no model can be built.
    """
    try:
        with build_errors(node, prefix), torch.device("meta"), quiet():
            return build("meta")
    except ConfigError:  # of the config or of the device: the CPU shows which
        with build_errors(node, prefix), torch.device("cpu"), quiet():
            return build("cpu")


def check_weights(
    model: nn.Module,
    weights: str,
    folder: str,
    resume: bool,
    train: bool,
    convert_batch_norm: bool = False,
    key: str = "MODEL.WEIGHTS",
) -> None:
    """Load the weights of a run into a model of its own: only the checks of loading remain.

    Args:
        model: as `without_data` builds it.
        weights: file that a run starts from.
        folder: of the run's checkpoints.
        resume: the last checkpoint of `folder` comes before `weights`.
        train: False for an evaluation, which needs all weights.
        convert_batch_norm: as in `SafeCheckpointer`.
        key: what the config calls `weights`.
    Raises:
        ConfigError: if an evaluation has no weights.
        CheckpointError: if the weights do not belong to the model.
    """
    resumes = resume and _has_checkpoint(folder)
    if not train and not weights and not resumes:
        raise ConfigError(
            f"{key} is '', but --eval-only needs weights: set it, or add --resume for the last "
            f"checkpoint of the output folder ({folder})"
        )
    checkpointer = SafeCheckpointer(
        model,
        folder,
        complete=not train,
        convert_batch_norm=convert_batch_norm,
        save_to_disk=False,
    )
    with quiet():
        try:
            checkpointer.resume_or_load(weights, resume=resume)
        except CheckpointError as error:
            raise CheckpointError(f"{'--resume' if resumes else key}: {error}") from error


def _has_checkpoint(folder: str) -> bool:
    return PathManager.isfile(f"{folder}/last_checkpoint")


@contextmanager
def build_errors(node: Mapping, prefix: str = "MODEL.") -> Iterator[None]:
    """Turn what building a model raises into one line that names the key, if it is known.

    Args:
        node: the model's part of the config.
        prefix: of its keys.
    """
    try:
        yield
    except ConfigError:
        raise
    except BUILD_ERRORS as error:
        if str(node.get("DEVICE")).startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(
                f"{prefix}DEVICE is {node['DEVICE']!r}, but torch finds no GPU: set "
                f'{prefix}DEVICE "cpu", or use a machine with a GPU'
            ) from error
        text = one_line(error, 300) or _where(error)
        value = error.args[0] if isinstance(error, KeyError) and error.args else None
        keys = [] if value is None else list(_keys_with(node, value, prefix))
        blamed = f"{keys[0]} has {value!r}, which is unknown: " if keys else ""
        raise ConfigError(
            f"{blamed}no model can be built from the config ({type(error).__name__}: {text}): correct "
            f"the keys of {prefix.rstrip('.')}"
        ) from error


def _where(error: Exception) -> str:
    """Return the source line that raised, for an `assert` without a message."""
    import traceback

    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.line} in {frame.name}"


def _keys_with(node: Mapping, value: Any, prefix: str) -> Iterator[str]:
    """Yield the keys whose value is `value` or a list that holds it."""
    for name, item in node.items():
        if isinstance(item, Mapping):
            yield from _keys_with(item, value, f"{prefix}{name}.")
        elif item == value or (
            isinstance(item, Sequence) and not isinstance(item, str) and value in item
        ):
            yield f"{prefix}{name}"


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what the real building and loading log again."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "mabn_d2")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
