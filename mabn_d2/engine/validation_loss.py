"""The losses of training on images that are not trained on."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.detection_utils import build_augmentation
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from ..data.loader import add_test_proposals
from ..data.mapper import NamingMapper
from ..data.seeding import mix, seeded
from ..data.workers import guard_workers
from ..modeling.norm_table import norm_layers


def build_validation_loader(cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]] | None:
    """Build a loader of single images with their annotations, resized as for evaluation.

    Returns:
        None if the dataset has no annotations.
    """
    records = get_detection_dataset_dicts(dataset_name, filter_empty=False, check_consistency=False)
    add_test_proposals(cfg, dataset_name, records)
    settings = DatasetMapper.from_config(cfg, is_train=True)
    settings["augmentations"] = build_augmentation(cfg, is_train=False)
    return validation_loader(records, DatasetMapper(**settings), cfg.DATALOADER.NUM_WORKERS)


def validation_loader(
    records: list[dict], mapper: Callable[[dict], dict], num_workers: int
) -> Iterable[list[dict]] | None:
    """As `build_validation_loader`, for records and a mapper that keeps annotations."""
    if not any("annotations" in record or "sem_seg_file_name" in record for record in records):
        return None
    if any("annotations" in record for record in records):  # an evaluator takes none for no objects
        records = [{"annotations": [], **record} for record in records]
    loader = build_detection_test_loader(
        records, mapper=NamingMapper(mapper), num_workers=num_workers
    )
    return guard_workers(loader)


def validation_losses(model: nn.Module, loader: Iterable[list[dict]]) -> dict[str, float]:
    """Return the mean over all images of each loss, and of their sum as `total_loss`.

    The model computes its losses as in training, but norms normalize by their running statistics
    and dropout does nothing, as in evaluation. Nothing of the model, of the random generators or of
    the event storage is changed. Anchors and RoIs are sampled by a seed of each image, so that equal
    weights give equal losses.

    Args:
        model: without DistributedDataParallel around it.
        loader: yields lists of records, those of this rank. All ranks must call this function.
    """
    total: dict[str, torch.Tensor] = {}
    images = 0
    with _as_in_validation(model), EventStorage(), torch.no_grad():
        for batch in loader:
            torch.manual_seed(mix(images, comm.get_rank()))
            for name, loss in model(batch).items():
                total[name] = total.get(name, 0) + loss.double() * len(batch)
            images += len(batch)
    names = sorted({name for rank in comm.all_gather(list(total)) for name in rank})
    device = next(model.parameters()).device
    sums = torch.stack(
        [torch.as_tensor(total.get(name, 0.0), dtype=torch.double, device=device) for name in names]
        + [torch.tensor(images, dtype=torch.double, device=device)]
    )
    if comm.get_world_size() > 1:
        dist.all_reduce(sums)
    means = (sums[:-1] / sums[-1]).tolist()
    return {"total_loss": sum(means), **dict(zip(names, means, strict=True))}


@contextmanager
def _as_in_validation(model: nn.Module) -> Iterator[None]:
    """Set the modes that `validation_losses` describes, and restore all that changes meanwhile."""
    # Attributes of all modules: modes, and what RetinaNet averages over its training iterations.
    attributes = {module: dict(vars(module)) for module in model.modules()}
    as_in_evaluation = (
        nn.modules.batchnorm._NormBase,
        nn.modules.dropout._DropoutNd,
        *norm_layers(),
    )
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), seeded(0):
        try:
            model.train()
            for module in model.modules():
                if isinstance(module, as_in_evaluation):
                    module.eval()
            yield
        finally:
            for module, values in attributes.items():
                vars(module).clear()
                vars(module).update(values)
