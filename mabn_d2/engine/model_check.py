"""The model of a config and its weights, checked without data before anything is trained or written."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

from ..checkpoint import CheckpointError, SafeCheckpointer
from ..modeling.norm import build_model
from .errors import ConfigError, one_line

_checked = set()  # so that a second look at the same config in this process costs nothing


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
    if model is not None:
        check_weights(cfg, model, resume, train)
    _checked.add(key)


def build_without_data(cfg: CfgNode) -> nn.Module | None:
    """Return the model of `cfg` on the meta device: shapes only.

    Returns:
        None for a model whose constructor needs data; it is checked when it is built and loaded.
    Raises:
        ConfigError: if no model can be built.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    try:
        with build_errors(cfg), torch.device("meta"), _quiet():
            return build_model(cfg)
    except ConfigError as error:
        if "meta tensor" in str(error).lower():
            return None
        raise


def check_weights(cfg: CfgNode, model: nn.Module, resume: bool, train: bool) -> None:
    """Load the weights of a run into a model without data: only the checks of loading remain."""
    folder = cfg.OUTPUT_DIR
    if not train and not cfg.MODEL.WEIGHTS and not (resume and _has_checkpoint(folder)):
        raise ConfigError(
            "MODEL.WEIGHTS is '', but --eval-only needs weights: set it, or add --resume for the last "
            f"checkpoint of OUTPUT_DIR ({folder})"
        )
    checkpointer = SafeCheckpointer(
        model,
        folder,
        complete=not train,
        convert_batch_norm=cfg.MODEL.MABN.CONVERT_WEIGHTS,
        save_to_disk=False,
    )
    with _quiet():
        try:
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        except CheckpointError as error:
            resumes = resume and checkpointer.has_checkpoint()
            key = "--resume" if resumes else "MODEL.WEIGHTS"
            raise CheckpointError(f"{key}: {error}") from error


def _has_checkpoint(folder):
    return PathManager.isfile(f"{folder}/last_checkpoint")


@contextmanager
def build_errors(cfg: CfgNode) -> Iterator[None]:
    """Turn what building a model raises into one line that names the key, if it is known."""
    try:
        yield
    except ConfigError:
        raise
    except (
        AssertionError,
        AttributeError,
        IndexError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
        ZeroDivisionError,
    ) as error:
        text = one_line(error, 300) or _where(error)
        value = error.args[0] if isinstance(error, KeyError) and error.args else None
        keys = [] if value is None else list(_keys_with(cfg.MODEL, value, "MODEL."))
        blamed = f"{keys[0]} has {value!r}, which is unknown: " if keys else ""
        raise ConfigError(
            f"{blamed}the model of MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} can't be "
            f"built ({type(error).__name__}: {text}): correct the keys of MODEL"
        ) from error


def _where(error):
    """Return the source line that raised, for an `assert` without a message."""
    import traceback

    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.line} in {frame.name}"


def _keys_with(node, value, prefix):
    """Yield the keys whose value is `value` or a list that holds it."""
    for name, item in node.items():
        if isinstance(item, dict):
            yield from _keys_with(item, value, f"{prefix}{name}.")
        elif item == value or (isinstance(item, (list, tuple)) and value in item):
            yield f"{prefix}{name}"


@contextmanager
def _quiet():
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
