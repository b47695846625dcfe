"""A training loader whose batches depend on the seed and the iteration alone.

Detectron2's loader starts over with the shuffle, the aspect-ratio groups and the augmentations when
a run resumes. Here the images of iteration i on a rank are the same whether the run was resumed, and
whatever the number of loader workers, so that a resumed run can equal the straight one.
"""

from collections.abc import Callable, Iterable

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
    print_instances_class_histogram,
)
from detectron2.data.build import (
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
    trivial_batch_collator,
)
from detectron2.data.detection_utils import check_metadata_consistency
from detectron2.utils import comm
from torch.utils.data import DataLoader

from .batches import TrainingBatches
from .errors import DataError
from .mapper import NamingMapper, SeededDataset
from .proposals import add_proposals
from .samplers import build_sampler
from .workers import end_with_parent, guard_workers


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Build Detectron2's loader for evaluation, whose errors name the image.

    BAD_INPUT "skip" does not apply, because the AP of fewer images is a different number.
    """
    records = get_detection_dataset_dicts(dataset_name, filter_empty=False)
    add_test_proposals(cfg, dataset_name, records)
    mapper = NamingMapper(DatasetMapper(cfg, False))
    loader = build_detection_test_loader(
        records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
    )
    return guard_workers(loader)


def add_test_proposals(cfg: CfgNode, dataset_name: str, records: list[dict]) -> None:
    """Add the proposals of a set of DATASETS.TEST to its records, if MODEL.LOAD_PROPOSALS asks for them."""
    if cfg.MODEL.LOAD_PROPOSALS:
        files = cfg.DATASETS.PROPOSAL_FILES_TEST
        add_proposals(records, files[list(cfg.DATASETS.TEST).index(dataset_name)])


def load_records(cfg: CfgNode) -> list[tuple[str, list[dict]]]:
    """Return the sets of DATASETS.TRAIN, each with its name and the records that are trained on.

    It does what `get_detection_dataset_dicts` does for all sets at once, with safe proposals.
    """
    names, sets = cfg.DATASETS.TRAIN, []
    for position, name in enumerate(names):
        records = get_detection_dataset_dicts(name, filter_empty=False, check_consistency=False)
        if cfg.MODEL.LOAD_PROPOSALS:
            add_proposals(records, cfg.DATASETS.PROPOSAL_FILES_TRAIN[position])
        if "annotations" in records[0]:
            if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
                records = filter_images_with_only_crowd_annotations(records)
            if cfg.MODEL.KEYPOINT_ON:
                least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
                records = filter_images_with_few_keypoints(records, least)
        sets.append((name, records))
    everything = [record for _, records in sets for record in records]
    if not everything:
        raise DataError(f"DATASETS.TRAIN is {names}, where no image is left to train on")
    classes = MetadataCatalog.get(names[0]).get("thing_classes")
    if classes is not None and "annotations" in everything[0]:
        check_metadata_consistency("thing_classes", names)
        print_instances_class_histogram(everything, classes)
    return sets


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict], dict] | None = None) -> DataLoader:
    """Build the loader from DATASETS, DATALOADER, SOLVER.IMS_PER_BATCH and ACCUMULATION_STEPS.

    Returns:
        DataLoader of lists of mapped records, those of this process in one optimizer iteration, its
        micro-batches one behind the other; `loader.batch_sampler.start` is the iteration that it
        begins with.
    Raises:
        ValueError: if IMS_PER_BATCH is no multiple of all processes' micro-batches.
        DataError: if the sampler or the proposals can't be used, or no image is left.
    """
    steps = cfg.SOLVER.get("ACCUMULATION_STEPS", 1)
    micro_batches = comm.get_world_size() * steps
    if cfg.SOLVER.IMS_PER_BATCH % micro_batches or micro_batches > cfg.SOLVER.IMS_PER_BATCH:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH ({cfg.SOLVER.IMS_PER_BATCH}) must be a multiple of the number "
            f"of training processes ({comm.get_world_size()}) times SOLVER.ACCUMULATION_STEPS "
            f"({steps}): change one of them"
        )
    # One seed for all ranks: they share one shuffle and take every n-th image of it.
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    sets = load_records(cfg)
    sampler = build_sampler(cfg, sets, seed)
    records = [record for _, part in sets for record in part]
    return seeded_loader(
        records,
        NamingMapper(mapper or DatasetMapper(cfg, True), repair_or("DATALOADER.BAD_INPUT")),
        sampler,
        seed,
        images=cfg.SOLVER.IMS_PER_BATCH // micro_batches,
        accumulation_steps=steps,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        skip_bad=cfg.DATALOADER.get("BAD_INPUT") == "skip",
    )


def repair_or(key: str) -> str:
    """Return the remedy for a bad image; `key` is what the config calls BAD_INPUT."""
    return f'repair or remove the image, or set {key} to "skip"'


def seeded_loader(
    records: list[dict],
    mapper: NamingMapper,
    sampler: Iterable[int],
    seed: int,
    *,
    images: int,
    accumulation_steps: int,
    aspect_ratio_grouping: bool,
    num_workers: int,
    skip_bad: bool,
    start: int = 0,
) -> DataLoader:
    """Build a loader whose batches depend on the seed and the iteration alone.

    Args:
        records: of all training sets.
        mapper: raises BadImageError for a record that can't be used.
        sampler: a sampler of Detectron2's, of indices into the records.
        seed: of the augmentations; the same on all ranks.
        images: in one micro-batch.
        accumulation_steps: micro-batches in one batch.
        aspect_ratio_grouping, num_workers: as in Detectron2's loader.
        skip_bad: take the next record in the place of one that can't be used.
        start: the iteration that it begins with.

    Returns:
        As `build_train_loader`.
    """
    batches = TrainingBatches(
        [(record.get("width", 1), record.get("height", 1)) for record in records],
        sampler,
        images,
        aspect_ratio_grouping,
        seed,
        accumulation_steps,
    )
    batches.start = start
    return DataLoader(
        SeededDataset(DatasetFromList(records, copy=False), mapper, skip_bad=skip_bad),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
        worker_init_fn=end_with_parent,
        # Its own, for the workers' seeds: starting them must not draw from the model's.
        generator=torch.Generator().manual_seed(seed),
    )
