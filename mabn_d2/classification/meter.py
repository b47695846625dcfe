"""Numbers of the iterations since the last log entry."""

import math
import time
from collections.abc import Sequence

import torch
from detectron2.utils import comm

from .processes import reduce_sum


class Meter:
    """Sums losses, rejected batches and times between two log entries.

    Losses and rejections stay on the device until `read`, the only synchronization with it.

    Args:
        device: of the model.
        images: images of one iteration, over all processes.
        world_size: number of processes.
        workers: loader processes of one process.
    """

    def __init__(self, device: torch.device, images: int, world_size: int, workers: int):
        self.device, self.images = device, images
        self.world_size, self.workers = world_size, workers
        self.loss, self.rejected, self.in_a_row = torch.zeros(3, device=device)
        self.reset()

    def reset(self) -> None:
        """Start anew; the batches that were rejected in a row up to now go on being counted."""
        self.loss.zero_()
        self.rejected.zero_()
        self.waited, self.loaded, self.iterations = 0.0, 0.0, 0
        self.bad_paths: list[str] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time up to now."""
        self.began = time.perf_counter()

    def add_batch(self, waited: float, loaded: float, bad_paths: Sequence[str]) -> None:
        """Count a batch of the loader.

        Args:
            waited: seconds that training waited for it.
            loaded: seconds that loading its images took.
            bad_paths: images that can't be read.
        """
        self.waited, self.loaded = self.waited + waited, self.loaded + loaded
        self.bad_paths += bad_paths

    def add_step(self, loss: torch.Tensor, reject: torch.Tensor) -> None:
        """Count a step; its loss is left out if the step was rejected."""
        self.loss += torch.where(reject, 0, loss)
        self.rejected += reject
        self.in_a_row.copy_((self.in_a_row + 1) * reject)
        self.iterations += 1

    def read(self) -> tuple[dict, int]:
        """Return the entry of log.json, and how many batches in a row were rejected."""
        loss, rejected, in_a_row = torch.stack([self.loss, self.rejected, self.in_a_row]).tolist()
        loss, loaded = reduce_sum([loss, self.loaded], self.device)
        seconds = time.perf_counter() - self.began
        count = self.iterations * self.images
        learned = (self.iterations - rejected) * self.world_size
        bad = [path for paths in comm.all_gather(self.bad_paths) for path in paths]
        entry = {
            "loss": loss / learned if learned else math.nan,
            "images_per_second": count / seconds,
            # What the loader processes deliver if they never have to wait.
            "loader_images_per_second": count * self.world_size * max(self.workers, 1) / loaded,
            "loader_wait": self.waited / seconds,
            "rejected_batches": int(rejected),
            "bad_images": len(bad),
            "bad_paths": bad,
        }
        return entry, int(in_a_row)
