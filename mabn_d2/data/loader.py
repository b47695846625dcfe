"""A training loader whose batches depend on the seed and the iteration alone.

Detectron2's loader starts over with the shuffle, the aspect-ratio groups and the augmentations when
a run resumes. Here the images of iteration i on a rank are the same whether the run was resumed, and
whatever the number of loader workers, so that a resumed run can equal the straight one.
"""

import itertools
import logging
import random
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.data import DatasetFromList, DatasetMapper, get_detection_dataset_dicts
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm


class BadImageError(RuntimeError):
    """An image that can't be read or does not fit its annotations."""


@contextmanager
def seeded(seed):
    """Seed the generators of random, numpy and torch (CPU), and restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        # Not torch.manual_seed: where CUDA is not started yet, that keeps a stack trace a call for it.
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def mix(*numbers):
    """Return a 32-bit seed made of non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class SeededDataset(torch.utils.data.Dataset):
    """Maps records by `mapper`, under a seed that comes with the index.

    Args:
        skip_bad: put the next record that can be read in the place of one that can't, and name the
            latter in the key `bad_images` of the result; if False, it is an error.
    """

    def __init__(self, records, mapper, skip_bad=False):
        self.records, self.mapper, self.skip_bad = records, mapper, skip_bad

    def __getitem__(self, key):
        index, seed = key
        bad = []
        while len(bad) < len(self.records):
            record = self.records[(index + len(bad)) % len(self.records)]
            try:
                with seeded(seed):
                    mapped = self.mapper(record)
            except (OSError, ValueError, SyntaxError, AssertionError) as error:
                # What PIL raises for files that are no image, truncated or damaged, and Detectron2
                # for those of another size than the annotations say.
                path = record.get("file_name")
                if not self.skip_bad:
                    raise BadImageError(
                        f"{path} can't be used ({type(error).__name__}: {error}): mend or remove it, "
                        'or set DATALOADER.BAD_INPUT to "skip"'
                    ) from error
                logging.getLogger(__name__).warning(f"{path} is skipped: {error}")
                bad.append(path)
            else:
                if bad:
                    mapped["bad_images"] = bad
                return mapped
        raise BadImageError(f"none of the {len(self.records)} images can be used")

    def __len__(self):
        return len(self.records)


class TrainingBatches:
    """Endless batches of (index, seed), starting at batch `start`, which may be set later.

    Args:
        shapes: (width, height) of each record.
        sampler: an endless iterable of indices, the same each time it is iterated.
        batch_size: images of this rank in one iteration.
        group_by_aspect_ratio: batch wide images with wide ones, as Detectron2 does.
        seed: what the records' seeds are made of, with the position in the sampler.
    """

    def __init__(self, shapes, sampler, batch_size, group_by_aspect_ratio, seed):
        self.shapes, self.sampler, self.batch_size = shapes, sampler, batch_size
        self.group_by_aspect_ratio, self.seed = group_by_aspect_ratio, seed
        self.start = 0

    def __iter__(self):
        drawn = (
            {"key": (index, mix(self.seed, comm.get_rank(), position)), "width": w, "height": h}
            for position, index in enumerate(map(int, self.sampler))
            for w, h in [self.shapes[index] if self.group_by_aspect_ratio else (1, 1)]
        )
        batches = AspectRatioGroupedDataset(drawn, self.batch_size)
        for batch in itertools.islice(batches, self.start, None):
            yield [record["key"] for record in batch]


def build_train_loader(cfg, mapper=None):
    """Build the loader from DATASETS, DATALOADER and SOLVER.IMS_PER_BATCH.

    Returns:
        DataLoader of lists of mapped records; `loader.batch_sampler.start` is the iteration that it
        begins with.
    Raises:
        ValueError: if IMS_PER_BATCH does not divide by the workers, or for a sampler that can't be
            resumed.
    """
    workers = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % workers or cfg.SOLVER.IMS_PER_BATCH < workers:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH ({cfg.SOLVER.IMS_PER_BATCH}) must be a multiple of the number "
            f"of training processes ({workers}): change one of them"
        )
    # One seed for all ranks: they share one shuffle and take every n-th image of it.
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=(
            cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
        ),
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        sampler = TrainingSampler(len(records), seed=seed)
    elif name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        sampler = RepeatFactorTrainingSampler(factors, seed=seed)
    else:
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is {name!r}: use TrainingSampler or "
            "RepeatFactorTrainingSampler"
        )
    batches = TrainingBatches(
        [(record.get("width", 1), record.get("height", 1)) for record in records],
        sampler,
        cfg.SOLVER.IMS_PER_BATCH // workers,
        cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        seed,
    )
    return torch.utils.data.DataLoader(
        SeededDataset(
            DatasetFromList(records, copy=False),
            mapper or DatasetMapper(cfg, True),
            skip_bad=cfg.DATALOADER.get("BAD_INPUT") == "skip",
        ),
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
        # Its own, for the workers' seeds: starting them must not draw from the model's.
        generator=torch.Generator().manual_seed(seed),
    )
