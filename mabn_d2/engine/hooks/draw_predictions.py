"""Pictures of predictions for TensorBoard."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from detectron2.engine import HookBase


class DrawPredictions(HookBase):
    """Puts truth and predictions of the first test images into the event storage.

    They are drawn every `period` iterations and after the last one, on the main process only.

    Args:
        pictures: draws them, (H, W, 3) uint8 each.
        period: iterations; 0: only after the last one.
    """

    def __init__(self, pictures: Callable[[], Iterable[np.ndarray]], period: int) -> None:
        self.pictures, self.period = pictures, period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.period > 0 and done % self.period == 0 and done != self.trainer.max_iter:
            self._draw()

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._draw()

    def _draw(self) -> None:
        for number, picture in enumerate(self.pictures()):
            image = torch.from_numpy(picture).permute(2, 0, 1)
            self.trainer.storage.put_image(f"predictions/{number}", image)
