"""Loaders of a LazyConfig: the seeded one for training, and those of the hooks."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from detectron2.config import instantiate
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from torch import nn

from ..data.loader import repair_or, seeded_loader
from ..data.mapper import NamingMapper
from ..data.requirements import DataRequirements
from ..data.workers import guard_workers
from ..visualization import pictures_of_dataset
from .validation_loss import validation_loader

# Arguments of Detectron2's loader that the seeded one has too.
_ARGUMENTS = {
    "_target_", "dataset", "mapper", "sampler", "total_batch_size", "aspect_ratio_grouping",
    "num_workers",
}  # fmt: skip

_logger = logging.getLogger(__name__)


def target(node: DictConfig) -> Any:
    """Return the class or function that a node of a LazyConfig calls."""
    value = node.get("_target_")
    return locate(value) if isinstance(value, str) else value


def can_be_seeded(node: DictConfig) -> bool:
    """Return whether `dataloader.train` is Detectron2's loader, without arguments of its own."""
    if target(node) is not build_detection_train_loader or not set(node) <= _ARGUMENTS:
        return False
    if node.get("sampler") is None:
        return True
    sampler = target(node.sampler)
    return isinstance(sampler, type) and issubclass(
        sampler, (TrainingSampler, RepeatFactorTrainingSampler)
    )


def build_train_loader(cfg: DictConfig, accumulation_steps: int, start: int = 0) -> Iterable[list]:
    """Build the loader of `dataloader.train`.

    In the place of Detectron2's own loader comes one of the same records, mapper and sampler whose
    batches depend on `train.seed` and the iteration alone. Another loader stays as it is.

    Args:
        accumulation_steps: micro-batches in one iteration.
        start: the iteration that it begins with.
    """
    node = cfg.dataloader.train
    records = instantiate(node.dataset) if can_be_seeded(node) else None
    if not isinstance(records, list):
        if start > 0:
            _logger.warning(
                "dataloader.train is a loader of its own, which starts over with its shuffle: the "
                "resumed run does not equal an undisturbed one"
            )
        return guard_workers(instantiate(node))
    given = cfg.train.get("seed", -1)
    seed = given if given >= 0 else comm.shared_random_seed()
    if node.get("sampler") is None:
        sampler = TrainingSampler(len(records), seed=seed)
    else:
        sampler = instantiate(node.sampler)
        if "seed" not in node.sampler:
            sampler._seed = seed
    return seeded_loader(
        records,
        NamingMapper(instantiate(node.mapper), repair_or("train.bad_input")),
        sampler,
        seed,
        images=node.total_batch_size // (comm.get_world_size() * accumulation_steps),
        accumulation_steps=accumulation_steps,
        aspect_ratio_grouping=node.get("aspect_ratio_grouping", True),
        num_workers=node.get("num_workers", 0),
        skip_bad=cfg.train.get("bad_input") == "skip",
        start=start,
    )


def is_dataset_mapper(node: DictConfig | None) -> bool:
    """Return whether a node is Detectron2's DatasetMapper, or a subclass of it."""
    found = target(node) if node is not None else None
    return isinstance(found, type) and issubclass(found, DatasetMapper)


def build_validation_loader(cfg: DictConfig) -> Iterable[list[dict]] | None:
    """Build a loader of the test images with annotations: None if they have none."""
    data = cfg.dataloader
    mapper = instantiate(data.train.mapper)
    mapper.augmentations = instantiate(data.test.mapper).augmentations
    return validation_loader(
        instantiate(data.test.dataset), mapper, data.test.get("num_workers", 0)
    )


def pictures(cfg: DictConfig, model: nn.Module) -> Callable[[], Iterator[np.ndarray]]:
    """Return what draws the predictions for the first test images."""
    mapper: Callable[[dict], dict] = instantiate(cfg.dataloader.test.mapper)
    name = DataRequirements.from_lazy(cfg).test.value[0]
    return lambda: pictures_of_dataset(name, mapper, model, cfg.train.pictures)
