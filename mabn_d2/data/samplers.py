"""Detectron2's training samplers, with a seed, so that a resumed run draws the same images."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)

from .errors import DataError

SAMPLERS = (
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    "WeightedTrainingSampler",
    "WeightedCategoryTrainingSampler",
)


def check_sampler(cfg: CfgNode) -> None:
    """Raise DataError if DATALOADER.SAMPLER_TRAIN or the settings of that sampler are wrong."""
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name not in SAMPLERS:
        raise DataError(f"DATALOADER.SAMPLER_TRAIN is {name!r}: use one of {', '.join(SAMPLERS)}")
    if name == "RandomSubsetTrainingSampler" and not 0 < cfg.DATALOADER.RANDOM_SUBSET_RATIO <= 1:
        raise DataError(
            f"DATALOADER.RANDOM_SUBSET_RATIO is {cfg.DATALOADER.RANDOM_SUBSET_RATIO}: use a share of "
            "the images, above 0 and up to 1"
        )
    if name.startswith("Weighted"):
        names, given = cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_REPEAT_FACTOR
        if not given or not all(_is_repeat_factor(pair, names) for pair in given):
            raise DataError(
                f"DATASETS.TRAIN_REPEAT_FACTOR is {given!r}: give pairs of a dataset of "
                f"DATASETS.TRAIN ({', '.join(names)}) and a positive number, such as "
                f"[[{names[0]!r}, 2.0]]"
            )


def _is_repeat_factor(pair: Any, names: Sequence[str]) -> bool:
    return (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and pair[0] in names
        and isinstance(pair[1], (int, float))
        and 0 < pair[1] < math.inf
    )


def build_sampler(cfg: CfgNode, sets: list[tuple[str, list[dict]]], seed: int) -> Iterable[int]:
    """Return the sampler DATALOADER.SAMPLER_TRAIN, of indices into all records, set by set.

    Args:
        sets: name and records of each set of DATASETS.TRAIN.
        seed: of the shuffle, and of the subset.

    Raises:
        DataError: if the name or the settings of the sampler are wrong.
    """
    check_sampler(cfg)
    name = cfg.DATALOADER.SAMPLER_TRAIN
    everything = [record for _, records in sets for record in records]
    if name == "TrainingSampler":
        return TrainingSampler(len(everything), seed=seed)
    if name == "RandomSubsetTrainingSampler":
        return _random_subset(cfg, len(everything), seed)
    if name == "RepeatFactorTrainingSampler":
        return RepeatFactorTrainingSampler(_category_factors(cfg, everything), seed=seed)
    if name == "WeightedTrainingSampler":
        return RepeatFactorTrainingSampler(_set_factors(cfg, sets), seed=seed)
    by_category = torch.cat([_category_factors(cfg, records) for _, records in sets])
    factors = by_category * _set_factors(cfg, sets)
    return RepeatFactorTrainingSampler(factors / factors.min(), seed=seed)


def _random_subset(cfg: CfgNode, size: int, seed: int) -> RandomSubsetTrainingSampler:
    ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
    if int(size * ratio) < 1:
        raise DataError(
            f"DATALOADER.RANDOM_SUBSET_RATIO is {ratio}, which is no image of {size}: use "
            f"{1 / size:.3g} or more"
        )
    return RandomSubsetTrainingSampler(size, ratio, seed_shuffle=seed, seed_subset=seed)


def _category_factors(cfg: CfgNode, records: list[dict]) -> torch.Tensor:
    threshold = cfg.DATALOADER.REPEAT_THRESHOLD
    # A key that Detectron2 has since 2024.
    more = {"sqrt": cfg.DATALOADER.REPEAT_SQRT} if "REPEAT_SQRT" in cfg.DATALOADER else {}
    return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        records, threshold, **more
    )


def _set_factors(cfg: CfgNode, sets: list[tuple[str, list[dict]]]) -> torch.Tensor:
    """Return how often each image is drawn in an epoch, by its set; (images,)."""
    factors = {name: float(factor) for name, factor in cfg.DATASETS.TRAIN_REPEAT_FACTOR}
    sizes = torch.tensor([len(records) for _, records in sets])
    return torch.tensor([factors.get(name, 1.0) for name, _ in sets]).repeat_interleave(sizes)
