"""BatchRenorm2d: Batch Renormalization, the published baseline between BatchNorm and MABN."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from .base import ConfigurableNorm, check_input, check_ranges


class BatchRenorm2d(ConfigurableNorm):
    r"""Batch Renormalization of (N, C, H, W) (Ioffe 2017, https://arxiv.org/abs/1702.03275).

    In training, with the batch's mean and variance, and the running ones before their update:

    .. math::
        \sigma_B = \sqrt{v_B + \epsilon}, \quad \sigma = \sqrt{v + \epsilon} \\
        r = \mathrm{clamp}(\sigma_B / \sigma, 1/r_{max}, r_{max}), \quad
        d = \mathrm{clamp}((\mu_B - \mu) / \sigma, -d_{max}, d_{max}) \\
        y = w\, (r\, (x - \mu_B) / \sigma_B + d) + b

    No gradient flows through r and d, all of it flows through the batch's statistics. The limits
    are 1 and 0 (BatchNorm) up to iteration `warmup_iters`, then grow linearly, r's to `r_max` at
    iteration `r_max_iter`, d's to `d_max` at `d_max_iter`. In evaluation it is BatchNorm.

    Args:
        num_features: C.
        eps: added to every variance.
        momentum: share of the *old* running statistics that is kept, as in MABN2d; torch's
            BatchNorm means the opposite by the same word. The paper's 0.01 is 0.99 here.
        warmup_iters, r_max, r_max_iter, d_max, d_max_iter: the paper's, for 130,000 iterations or
            more; short schedules need less.

    State: that of `nn.BatchNorm2d`, whose checkpoints load; `num_batches_tracked` is the schedule's
    counter. Two differences: `running_var` averages the biased variance, which is what r compares
    it with; and statistics stay float32 (float64 in a float64 module) under `.half()`.

    As in MABN2d, the state moves in training mode with gradients enabled. It does not for a
    weight that requires no grad (normalized as in evaluation), empty input, and input whose
    statistics are not finite. Note that activation checkpointing counts a forward twice, as it does
    with BatchNorm.

    Raises:
        ValueError: for an argument out of range.
    """

    SETTINGS: ClassVar[dict[str, type]] = {
        "eps": float,
        "momentum": float,
        "warmup_iters": int,
        "r_max": float,
        "r_max_iter": int,
        "d_max": float,
        "d_max_iter": int,
    }
    STATISTICS = ("running_mean", "running_var")

    eps: float
    momentum: float
    warmup_iters: int
    r_max: float
    r_max_iter: int
    d_max: float
    d_max_iter: int
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.99,
        warmup_iters: int = 5000,
        r_max: float = 3.0,
        r_max_iter: int = 40000,
        d_max: float = 5.0,
        d_max_iter: int = 25000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, device, dtype)
        self.register_buffer("running_mean", self._empty_statistics(num_features))
        self.register_buffer("running_var", self._empty_statistics(num_features))
        counter = torch.tensor(0, dtype=torch.int64, device=device)
        self.register_buffer("num_batches_tracked", counter)
        self.configure(
            eps=eps,
            momentum=momentum,
            warmup_iters=warmup_iters,
            r_max=r_max,
            r_max_iter=r_max_iter,
            d_max=d_max,
            d_max_iter=d_max_iter,
        )
        self.reset_parameters()

    def _check_settings(self, new: dict[str, Any]) -> None:
        check_ranges(
            new,
            {
                "eps": 0 < new["eps"] < math.inf,
                "momentum": 0 <= new["momentum"] <= 1,
                "warmup_iters": new["warmup_iters"] >= 0,
                "r_max": new["r_max"] >= 1,
                "d_max": new["d_max"] >= 0,
            },
        )
        for name in ("r_max_iter", "d_max_iter"):
            if new[name] < new["warmup_iters"]:
                raise ValueError(
                    f"{name} ({new[name]}) must not be before warmup_iters ({new['warmup_iters']})"
                )

    def scale_schedule(self, forwards: int) -> None:
        """Let the schedule, set in optimizer iterations, count forwards (see `MABN2d.scale_schedule`).

        Args:
            forwards: training forwards in one optimizer iteration.
        """
        names = ("warmup_iters", "r_max_iter", "d_max_iter")
        self.configure(**{name: getattr(self, name) * forwards for name in names})

    def reset_running_stats(self) -> None:
        """Reset the running statistics and the schedule's counter."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x: (N, C, H, W) -> the same shape, dtype and memory format.

        Args:
            x: any N, H, W, zero too.

        Raises:
            ValueError: if x is not (N, num_features, H, W), or has one value a channel in training.
        """
        check_input(self.num_features, x)
        # Vectors are wider than half-precision activations.
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if not (self.training and self.weight.requires_grad) or x.numel() == 0:
            mean, var = self.running_mean.to(dtype), self.running_var.to(dtype)
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        if x.numel() == self.num_features:
            raise ValueError(f"expected more than 1 value per channel, got {tuple(x.shape)}")
        update_state = torch.is_grad_enabled()
        with torch.no_grad():
            # The vectors' dtype, not x's, is that of the statistics returned, which are computed by
            # the vectorized kernel of every device and memory format, unlike `torch.var_mean`'s.
            _, mean, inv_std = torch.native_batch_norm(
                x, weight, bias, None, None, True, 0.0, self.eps
            )
            var = (inv_std.pow(-2) - self.eps).clamp_(min=0)
            r, d = self._correction(mean, var, update_state)
        # The correction is affine: BatchNorm's own kernel has the right gradients.
        return F.batch_norm(x, None, None, weight * r, weight * d + bias, True, 0.0, self.eps)

    def _correction(
        self, mean: torch.Tensor, var: torch.Tensor, update_state: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return r (C,) and d (C,) of a batch; if `update_state`, move the state by it."""
        t = self.num_batches_tracked + 1
        r_limit = 1 + (self.r_max - 1) * self._ramp(t, self.r_max_iter)
        d_limit = self.d_max * self._ramp(t, self.d_max_iter)
        inv_std = (self.running_var + self.eps).rsqrt()
        r = ((var + self.eps).sqrt() * inv_std).clamp(1 / r_limit, r_limit)
        d = ((mean - self.running_mean) * inv_std).clamp(-d_limit, d_limit)
        if update_state:
            self._update_state(mean, var)
        return r.to(mean.dtype), d.to(mean.dtype)

    def _update_state(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        accepted = mean.isfinite().all() & var.isfinite().all()
        for running, value in ((self.running_mean, mean), (self.running_var, var)):
            value = torch.where(accepted, value.to(running.dtype), running)
            running.lerp_(value, 1 - self.momentum)
        self.num_batches_tracked.add_(accepted)

    def _ramp(self, t: torch.Tensor, end: int) -> torch.Tensor:
        """Return 0 up to iteration warmup_iters, 1 from iteration `end` on, a line between them."""
        done = (t - self.warmup_iters).to(self.running_var.dtype)
        return (done / max(end - self.warmup_iters, 1)).clamp(0, 1)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Missing where BatchNorm was folded or frozen: the schedule then goes on from here.
        state_dict.setdefault(prefix + "num_batches_tracked", self.num_batches_tracked.clone())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
