"""FrozenBatchNorm2d of torchvision, for models that are folded without Detectron2."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d


class FrozenActMixin(nn.Module):
    """A FrozenBatchNorm2d followed by children `drop` and `act`, for a norm with an activation.

    The forward is written out, because TorchScript does not know `super()`.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor
    eps: float

    def __init__(self, num_features: int, eps: float, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(num_features, eps)
        self.drop, self.act = drop, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize, drop and activate x: (N, C, H, W) -> the same shape."""
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )
        return self.act(self.drop(x))


class FrozenMixedBatchNorm2d(FrozenBatchNorm2d):
    """torchvision's FrozenBatchNorm2d, whose output has the dtype of its input.

    In a model in half precision the statistics stay in float32; torchvision's forward would return
    float32 there, which the next convolution refuses.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x: (N, C, H, W) -> the same shape."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class FrozenBatchNormAct2d(FrozenActMixin, FrozenBatchNorm2d):
    """torchvision's FrozenBatchNorm2d, dropout and activation."""


KINDS: tuple[type[nn.Module], type[nn.Module]] = (FrozenMixedBatchNorm2d, FrozenBatchNormAct2d)
