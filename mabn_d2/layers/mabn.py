"""MABN2d: the state of Moving Average Batch Normalization and what moves it."""

import logging
import math
from collections import deque
from typing import NamedTuple

import torch
from torch import nn

from . import functional, functional_split
from .ops import torch_ops
from .ops.dispatch import find

# Uses of a layer between a forward and its recomputation: levels of a pyramid, micro-batches.
MAX_RECORDS = 32

_SETTINGS = (
    "eps",
    "momentum",
    "batch_size",
    "simulated_batch_size",
    "warmup_iters",
    "clip_start",
    "clip_limit",
    "split_batch",
)
_STATISTICS = ("running_var", "buffer_x2", "buffer_gz")
_PUBLISHED = {"buffer_x2": "pre_x2", "buffer_gz": "pre_gz"}  # of the classification form
_logger = logging.getLogger(__name__)


class Statistics(NamedTuple):
    """What one training forward normalized by; tensors on the layer's device."""

    x2: torch.Tensor  # (C,) mean(x^2) of this input; here and below (G, C) with split_batch
    var: torch.Tensor  # (C,) v: x2, or the mean of the window
    r: torch.Tensor  # (C,) sqrt(v + eps) / sqrt(running_var + eps), clipped; or 1
    slot: torch.Tensor  # (1,) int64, this input's row of both windows; unused with split_batch
    plain: torch.Tensor  # (1,) bool: warm-up, no window yet
    counted: torch.Tensor  # (1,) bool: this input has moved the state


class MABN2d(nn.Module):
    r"""Moving Average Batch Normalization (ICLR 2020) of (N, C, H, W), after a `CenConv2d`.

    In training, with t the iteration (one forward), m the window and a the momentum:

    .. math::
        v &= E[x^2] \text{ while } t \le m \text{ or } t < T,
            \text{ else the mean of the last } m \text{ of them (SMAS)} \\
        r &= 1 \text{ while } t \le \max(1000, T), \text{ else }
            \mathrm{clamp}(\sqrt{v + \epsilon} / \sqrt{R + \epsilon}, 1/5, 5) \\
        y &= w\, r\, x / \sqrt{v + \epsilon} + b, \qquad R \leftarrow a R + (1 - a) v
            \text{ (EMAS)}

    and the backward's statistic psi is averaged over a window too (see `functional.mabn_train`).
    In evaluation y = w x / sqrt(R + eps) + b, an affine map that folds into the convolution.

    Args:
        num_features: C.
        eps: added to every second moment.
        momentum: the paper's decay a, the share of the *old* running_var that is kept. Note that
            torch's BatchNorm means the opposite by the same word: its 0.02 is 0.98 here.
        batch_size: images in one normalization batch: those of one forward on one GPU, or B of
            `split_batch`.
        simulated_batch_size: images that the window spans; m = simulated_batch_size / batch_size.
        warmup_iters: T, iterations that are normalized by their own statistics.
        clip_start: r is 1 up to iteration max(clip_start, warmup_iters). The published 1000 is
            for 90,000 iterations or more; short schedules need less.
        clip_limit: r stays within [1 / clip_limit, clip_limit].
        activation: None or "relu", which is then fused and needs no tensor of its own.
        split_batch: the classification form, where SGD's batch is larger than a normalization
            batch: an input of N images is ceil(N / B) consecutive normalization batches of B
            images, the last one of what is left. The windows run over them, across iterations:
            group i of an iteration uses the mean of the m groups that end with it, forward and
            backward. The plain iteration is the first alone; r is 1 while t < warmup_iters, and
            clip_start has no part; R starts as the first iteration's mean of v and moves by an
            iteration's mean of v. Each group counts the same, a short one too. (See `functional_split.py`.)

    State: `weight`, `bias`, `running_var` (C,); the windows `buffer_x2`, `buffer_gz` (m, C); the
    counter `iters` (1,). With split_batch the windows' keys are the published `pre_x2`, `pre_gz`, the
    last row the latest. Statistics stay float32 (float64 in a float64 module) under `.half()`.
    `load_state_dict` takes the published layer's state, in any of its shapes; windows that do not
    fit are refilled: they and the counter start over together, running_var stays.

    What moves the state: a forward in training mode with gradients enabled, whether or not a
    backward follows. What does not: evaluation mode; `torch.no_grad` and `inference_mode`
    (normalized as in training); a weight that does not require grad (normalized as in evaluation);
    empty input; an input whose statistics are not finite, which `rejected` (1,) counts; and the
    recomputation of a forward by activation checkpointing.

    Raises:
        ValueError: for a window that is no whole number, or an argument out of range.
    """

    def __init__(
        self,
        num_features,
        eps=1e-5,
        momentum=0.98,
        batch_size=2,
        simulated_batch_size=32,
        warmup_iters=100,
        clip_start=1000,
        clip_limit=5.0,
        activation=None,
        split_batch=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be positive, got {num_features}")
        if activation not in (None, "relu"):
            raise ValueError(f'activation must be None or "relu", got {activation!r}')
        self.num_features = num_features
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        like = {"device": device, "dtype": _statistics_dtype(self.weight.dtype)}
        self.register_buffer("running_var", torch.empty(num_features, **like))
        self.register_buffer("buffer_x2", torch.empty(0, num_features, **like))
        self.register_buffer("buffer_gz", torch.empty(0, num_features, **like))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.int64, device=device))
        rejected = torch.zeros(1, dtype=torch.int64, device=device)
        self.register_buffer("rejected", rejected, persistent=False)
        self.configure(
            eps=eps,
            momentum=momentum,
            batch_size=batch_size,
            simulated_batch_size=simulated_batch_size,
            warmup_iters=warmup_iters,
            clip_start=clip_start,
            clip_limit=clip_limit,
            split_batch=split_batch,
        )
        self._records = deque(maxlen=MAX_RECORDS)
        self.reset_parameters()

    def configure(self, **settings):
        """Set any of the constructor's arguments from eps to clip_limit, or split_batch.

        A window of another length or form starts empty. Nothing changes if an argument is wrong.
        """
        new = {name: getattr(self, name, None) for name in _SETTINGS} | settings
        unknown = new.keys() - set(_SETTINGS)
        if unknown:
            raise TypeError(f"MABN2d has no argument {sorted(unknown)[0]}")
        batch_size, simulated = new["batch_size"], new["simulated_batch_size"]
        if batch_size < 1 or simulated < 1 or simulated % batch_size:
            raise ValueError(
                f"simulated_batch_size ({simulated}) must be a positive multiple of batch_size "
                f"({batch_size})"
            )
        for name, good in (
            ("eps", 0 < new["eps"] < math.inf),
            ("momentum", 0 <= new["momentum"] <= 1),
            ("warmup_iters", new["warmup_iters"] >= 0),
            ("clip_start", new["clip_start"] >= 0),
            ("clip_limit", new["clip_limit"] >= 1),
        ):
            if not good:
                raise ValueError(f"{name} is out of range: {new[name]}")
        window = simulated // batch_size
        other = getattr(self, "split_batch", None) != new["split_batch"]
        for name, value in new.items():
            setattr(self, name, value)
        if window != len(self.buffer_x2) or other:
            self.buffer_x2 = self.buffer_x2.new_zeros(window, self.num_features)
            self.buffer_gz = self.buffer_gz.new_zeros(window, self.num_features)
            self.reset_windows()

    def scale_schedule(self, forwards):
        """Let `warmup_iters` and `clip_start`, set in optimizer iterations, count forwards.

        The layer's counter counts training forwards. With gradient accumulation an iteration has
        several, and the schedule must end in the same iteration.

        Args:
            forwards: training forwards in one optimizer iteration. Call this once after
                `configure`: a second call scales again.
        """
        warmup, clip_start = self.warmup_iters, self.clip_start
        self.configure(
            # The first iteration that uses the window is number `warmup_iters`: all its forwards do.
            warmup_iters=(warmup - 1) * forwards + 1 if warmup > 0 else 0,
            # The last iteration with r = 1 is the later one of the two: none of its forwards clips.
            clip_start=max(clip_start, warmup) * forwards,
        )

    @property
    def window(self):
        """m, the number of iterations, or groups, that the windows span."""
        return len(self.buffer_x2)

    @property
    def last(self):
        """The Statistics of the newest training forward, or None; none under torch.compile."""
        return self._records[0] if self._records else None

    def reset_windows(self):
        """Empty both windows and set the counter back with them; running_var stays."""
        # The windows' rows are read only once the counter says that all of them are written.
        for buffer in (self.buffer_x2, self.buffer_gz, self.iters, self.rejected):
            buffer.zero_()

    def reset_running_stats(self):
        self.reset_windows()
        self.running_var.fill_(1)

    def reset_parameters(self):
        self.reset_running_stats()
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        """(N, C, H, W) -> the same shape, dtype and memory format. Any N, H, W, zero too.

        Raises:
            ValueError: if x is not (N, num_features, H, W).
        """
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(
                f"expected input of shape (N, {self.num_features}, H, W), got {tuple(x.shape)}"
            )
        if not (self.training and self.weight.requires_grad) or x.numel() == 0:
            y = functional.mabn_eval(x, self.weight, self.bias, self.running_var, self.eps)
            return y.relu_() if self.activation else y
        x = torch_ops.dense(x)
        counts = torch.is_grad_enabled()
        repeats = not torch.compiler.is_compiling() and _in_backward() and self._records
        operators = find(x, self.buffer_x2, split=self.split_batch)
        if operators and not repeats:
            return self._fused(operators, x, counts)
        with torch.no_grad():
            if self.split_batch:
                x2 = functional_split.group_mean_square(x, self.batch_size)
            else:
                x2 = torch_ops.mean_square(x)
            statistics = self._statistics(x2, counts)
        if self.split_batch:
            var = statistics.var
            y = functional_split.normalize_groups(
                x,
                self.weight,
                self.bias,
                torch.zeros_like(var),
                var,
                statistics.r,
                torch.zeros_like(var),
                self.eps,
                self.batch_size,
                self.buffer_gz,
                statistics.plain,
            )
            return y.relu_() if self.activation else y
        return functional.mabn_train(
            x,
            self.weight,
            self.bias,
            statistics.var,
            statistics.r,
            self.eps,
            self.buffer_gz,
            statistics.slot,
            statistics.plain,
            relu=self.activation is not None,
        )

    def _fused(self, operators, x, counts):
        y, *statistics = operators.mabn(
            x,
            self.weight,
            self.bias,
            self.buffer_gz,
            self.buffer_x2,
            self.running_var,
            self.iters,
            self.rejected,
            self.eps,
            self.momentum,
            self.warmup_iters,
            self.clip_start,
            self.clip_limit,
            counts,
            self.activation is not None,
            batch_size=self.batch_size if self.split_batch else 0,
        )
        self._remember(Statistics(*statistics))
        return y

    def _statistics(self, x2, counts):
        """Return the Statistics of an input with mean square x2, (C,) or (G, C).

        It is counted if `counts`.
        """
        if torch.compiler.is_compiling():  # which traces each forward once, recomputed or not
            return self._count(x2, counts)
        if _in_backward():
            records = [record for record in self._records if record.x2.shape == x2.shape]
            if records:
                return self._repeat(x2, records)
        statistics = self._count(x2, counts)
        self._remember(statistics)
        return statistics

    def _remember(self, statistics):
        if not torch.is_inference_mode_enabled():
            self._records.appendleft(statistics)

    def _count(self, x2, counts):
        """Return the Statistics of an input with mean square x2 that is not a repeated one."""
        finite = functional.is_finite(x2.flatten())
        return self._advance(x2, finite, ~finite, counts)

    def _advance(self, x2, accepted, rejected, counts=True):
        compiling = torch.compiler.is_compiling()
        state = (self.buffer_x2, self.running_var, self.iters)
        if self.split_batch:
            advance = (
                functional_split.advance_groups_op if compiling else functional_split.advance_groups
            )
            clip = (self.clip_limit,)
        else:
            advance = functional.advance_op if compiling else functional.advance
            clip = (self.clip_start, self.clip_limit)
        settings = (self.eps, self.momentum, self.warmup_iters, *clip)
        chosen = advance(x2, accepted, *state, *settings, counts)
        if counts:
            self.rejected.add_(rejected)
        return Statistics(x2, *chosen, torch.full_like(accepted, counts))

    def _repeat(self, x2, records):
        """Return the Statistics of the forward that is repeated; count it if it was not.

        Reentrant checkpointing runs the first forward without gradients, so that one has not been
        counted. The record is found on the device: the last one whose x2 is nearest.
        """
        stacked = Statistics(*map(torch.stack, zip(*records, strict=True)))
        distance = (stacked.x2.nan_to_num() - x2.nan_to_num()).abs().flatten(1).sum(1)
        nearest = distance.argmin(0, keepdim=True)
        first = Statistics(*(field.index_select(0, nearest)[0] for field in stacked))
        new, finite = ~first.counted, functional.is_finite(x2.flatten())
        now = self._advance(x2, finite & new, ~finite & new)
        return first._replace(slot=torch.where(first.counted, first.slot, now.slot))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.split_batch:
            for name, published in _PUBLISHED.items():
                destination[prefix + published] = destination.pop(prefix + name)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        self._migrate(state_dict, prefix)
        self._records.clear()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _migrate(self, state_dict, prefix):
        """Bring the published layers' shapes and names to this layer's, in place."""
        for name in ("weight", "bias", "running_var"):
            value = state_dict.get(prefix + name)
            if value is not None and tuple(value.shape) == (1, self.num_features, 1, 1):
                state_dict[prefix + name] = value.reshape(-1)
        if prefix + "running_var" not in state_dict:
            return  # nothing of this layer, or not enough: the caller hears of it as usual
        # Windows over groups and windows over iterations are different things.
        for name in ("buffer_x2", "buffer_gz"):
            pre = state_dict.pop(prefix + _PUBLISHED[name], None)
            if self.split_batch:
                state_dict.pop(prefix + name, None)
                if pre is not None:
                    state_dict[prefix + name] = pre
        state_dict.pop(prefix + "sta_matrix", None)
        own = {name: getattr(self, name) for name in ("buffer_x2", "buffer_gz", "iters")}
        for name, value in own.items():
            found = state_dict.get(prefix + name)
            if found is None or found.numel() != value.numel():
                empty = {prefix + n: torch.zeros_like(v) for n, v in own.items()}
                if any(key in state_dict for key in empty):
                    _logger.warning(
                        f"{prefix}{name} does not fit a window of {self.window}: "
                        "the windows start empty"
                    )
                state_dict.update(empty)
                return
            state_dict[prefix + name] = found.reshape(value.shape)

    def _apply(self, fn, *args, **kwargs):
        before = {name: getattr(self, name) for name in _STATISTICS}
        super()._apply(fn, *args, **kwargs)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype != _statistics_dtype(after.dtype):  # .half(), .bfloat16()
                setattr(self, name, buffer.to(after.device))
        self._records.clear()
        return self

    def __getstate__(self):
        return {**self.__dict__, "_records": deque(maxlen=MAX_RECORDS)}

    def extra_repr(self):
        shown = [f"{name}={getattr(self, name)}" for name in _SETTINGS if name != "split_batch"]
        if self.split_batch:
            shown.append("split_batch=True")
        if self.activation:
            shown.append(f"activation={self.activation}")
        return ", ".join([str(self.num_features), *shown])


def _in_backward():
    """Within a backward: a forward there is one that activation checkpointing repeats."""
    return torch._C._current_graph_task_id() != -1


def _statistics_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)
