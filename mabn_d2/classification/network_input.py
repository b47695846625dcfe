"""From loaded images to what a classifier takes."""

from argparse import Namespace
from functools import lru_cache

import torch

# torchvision's mean and standard deviation of RGB, levels of 0-255.
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


@lru_cache
def _mean_and_std(device: torch.device) -> list[torch.Tensor]:
    """Copied to the device once: a copy in every iteration would wait for the device."""
    return [torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD)]


def to_input(images: torch.Tensor, args: Namespace, device: torch.device) -> torch.Tensor:
    """Return (N, 3, H, W) uint8 RGB as the network's float32 input on the device.

    Args:
        images: of the loader.
        args: `bgr255` and `channels_last` of the command line.
        device: of the network.
    """
    images = images.to(device, non_blocking=True).float()
    if args.bgr255:
        images = images.flip(1)
    else:
        mean, std = _mean_and_std(device)
        images = (images - mean) / std
    return images.contiguous(memory_format=torch.channels_last) if args.channels_last else images
