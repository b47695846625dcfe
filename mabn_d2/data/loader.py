"""A training loader whose batches depend on the seed and the iteration alone.

Detectron2's loader starts over with the shuffle, the aspect-ratio groups and the augmentations when
a run resumes. Here the images of iteration i on a rank are the same whether the run was resumed, and
whatever the number of loader workers, so that a resumed run can equal the straight one.
"""

import itertools
import logging
import os
import random
import tempfile
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from detectron2.utils.file_io import PathHandler, PathManager
from PIL import Image

from .coco_check import check_coco, clean_coco
from .workers import end_with_parent, guard_workers

MAX_BAD = 1000  # images in a row: then it is not the images


class BadImageError(RuntimeError):
    """An image that can't be read or does not fit its annotations: one line with its path."""

    def __init__(self, message):
        # One of a loader worker comes with the worker's traceback in front.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


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


class NamingMapper:
    """Maps records by `mapper`; whatever it raises becomes a BadImageError with the image's path.

    Readers raise anything for a damaged file: OSError, SyntaxError, zlib's error, PIL's
    DecompressionBombError. An image of more than 8 bits a channel in one channel is refused too:
    Detectron2 would cut it off at 255, and see white.
    """

    def __init__(self, mapper, remedy="mend or remove it"):
        self.mapper, self.remedy = mapper, remedy

    def __call__(self, record):
        path = record.get("file_name")
        try:
            if path is not None:
                self._check_depth(path)
            return self.mapper(record)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise BadImageError(
                f"{path} can't be used ({type(error).__name__}: {reason}): {self.remedy}"
            ) from error

    @staticmethod
    def _check_depth(path):
        with PathManager.open(path, "rb") as file, Image.open(file) as image:  # reads the header only
            if image.mode[0] in "IF":
                raise ValueError(f"mode {image.mode}, which needs converting to 8 bits a channel")


class SeededDataset(torch.utils.data.Dataset):
    """Maps records by `mapper`, under a seed that comes with the index.

    Args:
        mapper: raises BadImageError for a record that can't be used.
        skip_bad: put the next record that can be used in the place of one that can't, and name the
            latter in the key `bad_images` of the result; if False, it is an error.
    """

    def __init__(self, records, mapper, skip_bad=False):
        self.records, self.mapper, self.skip_bad = records, mapper, skip_bad

    def __getitem__(self, key):
        index, seed = key
        bad = []
        while len(bad) < min(len(self.records), MAX_BAD):
            record = self.records[(index + len(bad)) % len(self.records)]
            try:
                with seeded(seed):
                    mapped = self.mapper(record)
            except BadImageError as error:
                if not self.skip_bad:
                    raise
                logging.getLogger(__name__).warning(f"skipped: {error}")
                bad.append(record.get("file_name"))
                last = error
            else:
                if bad:
                    mapped["bad_images"] = bad
                return mapped
        raise BadImageError(f"none of {len(bad)} images can be used; the last: {last}") from last

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


class _Replaced(PathHandler):
    """Lets Detectron2 read a copy of `file` that lacks the entries with problems."""

    def __init__(self, file, problems):
        self.file, self.folder = file, tempfile.TemporaryDirectory(prefix="mabn_d2-")
        self.copy = os.path.join(self.folder.name, os.path.basename(file))
        clean_coco(file, problems, self.copy)

    def _get_supported_prefixes(self):
        return [self.file]

    def _get_local_path(self, path, force=False, **kwargs):
        return self.copy if path == self.file else path

    def _isfile(self, path, **kwargs):
        return os.path.isfile(path)

    def _exists(self, path, **kwargs):
        return os.path.exists(path)

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        return open(self._get_local_path(path), mode, buffering, **kwargs)


def coco_files(names):
    """Yield (name, JSON file, image folder) of the COCO datasets among these that lie there already."""
    for name in dict.fromkeys(names):
        metadata = MetadataCatalog.get(name)
        json_file = metadata.get("json_file")
        if json_file and os.path.isfile(json_file):
            yield name, json_file, metadata.image_root


def leave_out_bad_entries(names):
    """Have Detectron2 read the datasets of these names without what `check_coco` finds wrong."""
    for name, json_file, image_root in coco_files(names):
        problems = check_coco(json_file, image_root, skip=True)
        if problems:
            PathManager.register_handler(_Replaced(json_file, problems))
            logging.getLogger(__name__).warning(f"{name}: {len(problems)} bad entries are left out")


def build_test_loader(cfg, dataset_name):
    """Build Detectron2's loader for evaluation, whose errors name the image.

    BAD_INPUT "skip" does not apply: the AP of fewer images is another.
    """
    mapper = NamingMapper(DatasetMapper(cfg, False))
    return guard_workers(build_detection_test_loader(cfg, dataset_name, mapper=mapper))


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
    skip = cfg.DATALOADER.get("BAD_INPUT") == "skip"
    if skip:
        leave_out_bad_entries(cfg.DATASETS.TRAIN)
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
    remedy = 'mend or remove it, or set DATALOADER.BAD_INPUT to "skip"'
    return torch.utils.data.DataLoader(
        SeededDataset(
            DatasetFromList(records, copy=False),
            NamingMapper(mapper or DatasetMapper(cfg, True), remedy),
            skip_bad=skip,
        ),
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
        worker_init_fn=end_with_parent,
        # Its own, for the workers' seeds: starting them must not draw from the model's.
        generator=torch.Generator().manual_seed(seed),
    )
