"""Errors of a classifier on the test images."""

from argparse import Namespace
from collections.abc import Iterable

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm

from .image_folder import ImagesError
from .network_input import to_input
from .processes import reduce_sum


def evaluate(model: nn.Module, loader: Iterable, args: Namespace, device: torch.device) -> dict:
    """Return top-1 and top-5 errors, counted exactly over all ranks.

    Args:
        model: in training mode on return.
        loader: batches as `image_folder.collate` returns them.
        args: `amp`, `bgr255` and `channels_last` of the command line.
        device: of the model.

    Returns:
        "top1_error" and "top5_error" in %, "images", "bad_images" and "bad_paths".

    Raises:
        ImagesError: if no image can be read.
    """
    model.eval()
    *sums, bad = count_correct(model, loader, args, device)
    model.train()
    # Not in inference mode: collectives of torch < 2.5 need ordinary tensors.
    correct1, correct5, count = reduce_sum(sums, device)
    bad = [path for paths in comm.all_gather(bad) for path in paths]
    if not count:
        raise ImagesError("no image of val/ can be read")
    errors = {
        "top1_error": 100 * (1 - correct1 / count),
        "top5_error": 100 * (1 - correct5 / count),
    }
    return {**errors, "images": int(count), "bad_images": len(bad), "bad_paths": bad}


@torch.inference_mode()
def count_correct(
    model: nn.Module, loader: Iterable, args: Namespace, device: torch.device
) -> tuple[int, int, int, list[str]]:
    """Return this rank's images that are right at first, right among five, all, and bad paths."""
    correct1, correct5 = torch.zeros(2, dtype=torch.int64, device=device)
    count, bad = 0, []
    hidden = dist.is_initialized() and dist.get_rank() > 0
    for images, labels, bad_paths, _ in tqdm(loader, "test", leave=False, disable=hidden or None):
        bad += bad_paths
        if not len(labels):
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            scores = model(to_input(images, args, device))
        best = scores.topk(min(5, scores.shape[1]), 1).indices == labels.to(device)[:, None]
        correct1 += best[:, 0].sum()
        correct5 += best.sum()
        count += len(labels)
    return int(correct1), int(correct5), count, bad
