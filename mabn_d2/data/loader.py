"""A training loader whose batches depend on the seed and the iteration alone.

Detectron2's loader starts over with the shuffle, the aspect-ratio groups and the augmentations when
a run resumes. Here the images of iteration i on a rank are the same whether the run was resumed, and
whatever the number of loader workers, so that a resumed run can equal the straight one.
"""

import torch
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm

from .batches import TrainingBatches
from .coco_files import leave_out_bad_entries
from .mapper import NamingMapper, SeededDataset
from .workers import end_with_parent, guard_workers


def build_test_loader(cfg, dataset_name):
    """Build Detectron2's loader for evaluation, whose errors name the image.

    BAD_INPUT "skip" does not apply: the AP of fewer images is another.
    """
    mapper = NamingMapper(DatasetMapper(cfg, False))
    return guard_workers(build_detection_test_loader(cfg, dataset_name, mapper=mapper))


def build_train_loader(cfg, mapper=None):
    """Build the loader from DATASETS, DATALOADER, SOLVER.IMS_PER_BATCH and ACCUMULATION_STEPS.

    Returns:
        DataLoader of lists of mapped records, those of this process in one optimizer iteration, its
        micro-batches one behind the other; `loader.batch_sampler.start` is the iteration that it
        begins with.
    Raises:
        ValueError: if IMS_PER_BATCH is no multiple of all processes' micro-batches, or for a sampler
            that can't be resumed.
    """
    steps = cfg.SOLVER.get("ACCUMULATION_STEPS", 1)
    micro_batches = comm.get_world_size() * steps
    if cfg.SOLVER.IMS_PER_BATCH % micro_batches or micro_batches > cfg.SOLVER.IMS_PER_BATCH:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH ({cfg.SOLVER.IMS_PER_BATCH}) must be a multiple of the number "
            f"of training processes ({comm.get_world_size()}) times SOLVER.ACCUMULATION_STEPS "
            f"({steps}): change one of them"
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
        cfg.SOLVER.IMS_PER_BATCH // micro_batches,
        cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        seed,
        steps,
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
