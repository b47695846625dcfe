"""Pictures of predictions for TensorBoard."""

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn

from ...visualization import prediction_pictures


class DrawPredictions(HookBase):
    """Puts truth and predictions of the first test images into the event storage.

    They are drawn every `period` iterations and after the last one, on the main process only.

    Args:
        cfg: DATASETS.TEST[0] has the images.
        model: without DistributedDataParallel around it; its mode is restored.
        period: iterations; 0: only after the last one.
        num_images: number of pictures.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, period: int, num_images: int):
        self.cfg, self.model, self.period, self.num_images = cfg, model, period, num_images

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.period > 0 and done % self.period == 0 and done != self.trainer.max_iter:
            self._draw()

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._draw()

    def _draw(self) -> None:
        pictures = prediction_pictures(self.cfg, self.model, self.num_images)
        for number, picture in enumerate(pictures):
            image = torch.from_numpy(picture).permute(2, 0, 1)
            self.trainer.storage.put_image(f"predictions/{number}", image)
