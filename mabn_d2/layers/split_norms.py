"""Norms of normalization batches smaller than the batch: groups of images, see functional_split.py."""

from typing import Any, ClassVar

import torch
from torch import nn

from .base import check_input
from .batch_renorm import BatchRenorm2d
from .functional_split import group_sizes
from .functional_split_bn import group_moments, normalize_groups
from .mabn import MABN2d
from .ops.memory_format import dense


class SplitMABN2d(MABN2d):
    """MABN's classification form, where SGD's batch is larger than a normalization batch.

    An input of N images is ceil(N / B) consecutive normalization batches of B images; the last one has
    what is left. The windows run over these groups, across iterations: group i of an iteration uses the
    mean of the m groups that end with it, forward and backward alike. Only the first iteration uses
    each group's own statistics. r is 1 while t < warmup_iters, and clip_start has no effect. R starts
    as the first iteration's mean of v, and moves by each iteration's mean of v. Each group counts the
    same, a short one too.

    Args:
        batch_size: B.
        simulated_batch_size: images that the window spans; m = simulated_batch_size / batch_size.
        others: see MABN2d. `MABN2d(..., split_batch=True)` makes this class too.

    State: as in MABN2d, but in the state dict the windows have the published keys `pre_x2`, `pre_gz`,
    and their last row is the latest group.
    """

    WINDOW_KEYS: ClassVar[dict[str, str]] = {"buffer_x2": "pre_x2", "buffer_gz": "pre_gz"}
    split_batch = True

    # torch.distributed.checkpoint needs an attribute for each key of the state dict.
    @property
    def pre_x2(self) -> torch.Tensor:
        """`buffer_x2` by its published name."""
        return self.buffer_x2

    @property
    def pre_gz(self) -> torch.Tensor:
        """`buffer_gz` by its published name."""
        return self.buffer_gz

    def _thresholds(self, window: int) -> tuple[int, int]:
        return 1, self.warmup_iters - 1

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, split_batch=True"


MABN2d.FORMS[True] = SplitMABN2d


def _check(layer: "SplitBatchNorm2d | SplitBatchRenorm2d", x: torch.Tensor) -> None:
    """Raise ValueError if `layer` cannot train on x: like BatchNorm, it needs two values."""
    check_input(layer.num_features, x)
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

    # As they are with the arguments that this class has.
    momentum: float
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(
        self, num_features: int, batch_size: int, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.batch_size = batch_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x: (N, C, H, W) -> the same shape, dtype and memory format."""
        if not self.training or len(x) <= self.batch_size or x.numel() == 0:
            return super().forward(x)
        _check(self, x)
        x = dense(x)
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

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, batch_size={self.batch_size}"


class SplitBatchRenorm2d(BatchRenorm2d):
    """`BatchRenorm2d` of consecutive groups of images, each with statistics, r and d of its own.

    Args:
        batch_size: images in one group; a short last group has what is left.
        settings: those of BatchRenorm2d. Iterations count forwards, not groups, and the running
            statistics move once a forward, by the mean over the groups.
    """

    def __init__(self, num_features: int, batch_size: int, **settings: Any) -> None:
        super().__init__(num_features, **settings)
        self.batch_size = batch_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x: (N, C, H, W) -> the same shape, dtype and memory format."""
        trains = self.training and self.weight.requires_grad
        if not trains or len(x) <= self.batch_size or x.numel() == 0:
            return super().forward(x)
        _check(self, x)
        x = dense(x)
        update_state = torch.is_grad_enabled()
        with torch.no_grad():
            mean, var = group_moments(x, self.batch_size)
            r, d = self._correction(mean, var, update_state)
        affine = (self.weight, self.bias)
        return normalize_groups(x, *affine, mean, var, r, d, self.eps, self.batch_size)

    def _update_state(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        # One group, from the base class's forward, has no dimension for groups.
        super()._update_state(*(v.mean(0) if v.dim() == 2 else v for v in (mean, var)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, batch_size={self.batch_size}"
