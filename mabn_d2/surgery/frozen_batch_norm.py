"""FrozenBatchNorm2d of torchvision, for models that are folded without Detectron2."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d


class FrozenReLUMixin:
    """A FrozenBatchNorm2d followed by ReLU, for a norm made with activation="relu"; same state.

    The forward is written out, because TorchScript does not know `super()`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        ).relu()


class FrozenBatchNormReLU2d(FrozenReLUMixin, FrozenBatchNorm2d):
    """torchvision's FrozenBatchNorm2d and ReLU."""


KINDS: tuple[type[nn.Module], type[nn.Module]] = (FrozenBatchNorm2d, FrozenBatchNormReLU2d)
