"""BatchNorm and Batch Renormalization of normalization batches smaller than the batch."""

import torch
from torch import nn

from .batch_renorm import BatchRenorm2d
from .functional_split import group_moments, group_sizes, normalize_groups
from .ops import torch_ops


def _check(layer, x):
    """Raise ValueError where `layer` can't train on x: as BatchNorm, which needs two values."""
    if x.dim() != 4 or x.shape[1] != layer.num_features:
        raise ValueError(
            f"expected input of shape (N, {layer.num_features}, H, W), got {tuple(x.shape)}"
        )
    smallest = len(x) % layer.batch_size or layer.batch_size
    if smallest * x.shape[2] * x.shape[3] == 1:
        raise ValueError(
            f"expected more than 1 value per channel in each group of {layer.batch_size} images, "
            f"got {tuple(x.shape)}: drop a short last batch, or use larger images"
        )


class SplitBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` of consecutive groups of images, each normalized by its own statistics.

    Args:
        num_features, eps, momentum: those of `nn.BatchNorm2d` (momentum is the *new* share).
        batch_size: images in one group; a short last group has what is left. An input of no more
            images is normalized by `nn.BatchNorm2d` itself.

    The running statistics move once a forward, by the mean over the groups. State and evaluation
    are those of `nn.BatchNorm2d`.
    """

    def __init__(self, num_features, batch_size, eps=1e-5, momentum=0.1):
        super().__init__(num_features, eps, momentum)
        self.batch_size = batch_size

    def forward(self, x):
        """(N, C, H, W) -> the same shape, dtype and memory format."""
        if not self.training or len(x) <= self.batch_size or x.numel() == 0:
            return super().forward(x)
        _check(self, x)
        x = torch_ops.dense(x)
        with torch.no_grad():
            mean, var = group_moments(x, self.batch_size)
            n = group_sizes(len(x), self.batch_size, mean) * (x.shape[2] * x.shape[3])
            unbiased = var * (n / (n - 1))
            self.running_mean.lerp_(mean.mean(0).to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.mean(0).to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
            r, d = torch.ones_like(var), torch.zeros_like(var)
        affine = (self.weight, self.bias)
        return normalize_groups(x, *affine, mean, var, r, d, self.eps, self.batch_size)

    def extra_repr(self):
        return f"{super().extra_repr()}, batch_size={self.batch_size}"


class SplitBatchRenorm2d(BatchRenorm2d):
    """`BatchRenorm2d` of consecutive groups of images, each with statistics, r and d of its own.

    Args:
        batch_size: images in one group; a short last group has what is left.
        settings: those of BatchRenorm2d. Iterations count forwards, not groups, and the running
            statistics move once a forward, by the mean over the groups.
    """

    def __init__(self, num_features, batch_size, **settings):
        super().__init__(num_features, **settings)
        self.batch_size = batch_size

    def forward(self, x):
        """(N, C, H, W) -> the same shape, dtype and memory format."""
        trains = self.training and self.weight.requires_grad
        if not trains or len(x) <= self.batch_size or x.numel() == 0:
            return super().forward(x)
        _check(self, x)
        x = torch_ops.dense(x)
        counts = torch.is_grad_enabled()
        with torch.no_grad():
            mean, var = group_moments(x, self.batch_size)
            r, d = self._correction(mean, var, counts)
        affine = (self.weight, self.bias)
        return normalize_groups(x, *affine, mean, var, r, d, self.eps, self.batch_size)

    def _count(self, mean, var):
        # One group, from the base class's forward, has no dimension for groups.
        super()._count(*(v.mean(0) if v.dim() == 2 else v for v in (mean, var)))

    def extra_repr(self):
        return f"{super().extra_repr()}, batch_size={self.batch_size}"
