"""MABN2d: the state of Moving Average Batch Normalization and what moves it."""

import logging
import math
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from . import functional
from .base import ConfigurableNorm, check_input, check_ranges
from .functional_split import mean_square
from .ops import torch_ops
from .ops.dispatch import select_backend
from .ops.memory_format import dense

# Uses of a layer between a forward and its recomputation: levels of a pyramid, micro-batches.
MAX_RECORDS = 32
MISFIT = "%s does not fit a window of %d: the windows start empty"  # what loading a state logs
OF_BATCH_NORM = (
    "weights of BatchNorm are loaded into MABN2d, which computes something else with them: convert them "
    "by tools/convert_weights.py, or load them by SafeCheckpointer(model, convert_batch_norm=True)"
)

_logger = logging.getLogger(__name__)


class Statistics(NamedTuple):
    """What one training forward normalized by; tensors on the layer's device."""

    x2: torch.Tensor  # (C,) mean(x^2) of this input; (G, C) in the split form, as var and r
    var: torch.Tensor  # (C,) v: x2, or the mean of the window
    r: torch.Tensor  # (C,) sqrt(v + eps) / sqrt(running_var + eps), clipped; or 1
    slot: torch.Tensor  # (1,) int64, this input's row of both windows; unused in the split form
    use_batch_stats: torch.Tensor  # (1,) bool: v is x2, in warm-up or until the window is full
    counted: torch.Tensor  # (1,) bool: this input has moved the state


class MABN2d(ConfigurableNorm):
    r"""Moving Average Batch Normalization (ICLR 2020) of (N, C, H, W), after a `CenConv2d`.

    In training, with t the iteration (one forward), m the window and a the momentum:

    .. math::
        v &= E[x^2] \text{ while } t \le m \text{ or } t < T,
            \text{ else the mean of the last } m \text{ of them (SMAS)} \\
        r &= 1 \text{ while } t \le \max(S, T), \text{ else }
            \mathrm{clamp}(\sqrt{v + \epsilon} / \sqrt{R + \epsilon}, 1/L, L) \\
        y &= w\, r\, x / \sqrt{v + \epsilon} + b, \qquad R \leftarrow a R + (1 - a) v
            \text{ (EMAS)}

    and the backward's statistic psi is averaged over a window too (see `functional.mabn_train`).
    In evaluation y = w x / sqrt(R + eps) + b, an affine map that folds into the convolution.

    Args:
        num_features: C.
        eps: added to every second moment.
        momentum: the paper's decay a, the share of the *old* running_var that is kept. Note that in
            torch's BatchNorm momentum is the *new* share: its 0.02 is 0.98 here.
        batch_size: images in one normalization batch: those of one forward on one GPU, or of one
            group in the split form.
        simulated_batch_size: images that the window spans; m = simulated_batch_size / batch_size.
        warmup_iters: T, iterations that are normalized by their own statistics.
        clip_start: S, r is 1 up to iteration max(clip_start, warmup_iters). The published 1000 is
            for 90,000 iterations or more; short schedules need less.
        clip_limit: L, r stays within [1 / clip_limit, clip_limit].
        activation: None or "relu". A ReLU is computed in the same pass and saves no other tensor.
        split_batch: True makes a `SplitMABN2d`, for batches of SGD that are larger than a
            normalization batch; it is a subclass of this one.
        device, dtype: of weight and bias.

    State: `weight`, `bias`, `running_var` (C,); the windows `buffer_x2`, `buffer_gz` (m, C); the
    counter `iters` (1,). Statistics stay float32 (float64 in a float64 module) under `.half()`.
    `load_state_dict` takes the published layer's state, in any of its shapes. Windows that do not fit
    are refilled: they and the counter start over together, running_var stays. Under a GradScaler
    call `rescale_mabn_windows` after each `update`: buffer_gz has the scale of the loss.

    What moves the state: a forward in training mode with gradients enabled, whether or not a
    backward follows. What does not: evaluation mode; `torch.no_grad` and `inference_mode`
    (normalized as in training); a weight that does not require grad (normalized as in evaluation);
    empty input; an input whose statistics are not finite, which `rejected` (1,) counts; and the
    recomputation of a forward by activation checkpointing.

    Raises:
        ValueError: if the window is not a whole number, or an argument is out of range.
    """

    SETTINGS: ClassVar[dict[str, type]] = {
        "eps": float,
        "momentum": float,
        "batch_size": int,
        "simulated_batch_size": int,
        "warmup_iters": int,
        "clip_start": int,
        "clip_limit": float,
    }
    STATISTICS = ("running_var", "buffer_x2", "buffer_gz")
    # Buffer -> its key in the state dict.
    WINDOW_KEYS: ClassVar[dict[str, str]] = {"buffer_x2": "buffer_x2", "buffer_gz": "buffer_gz"}
    # Value of split_batch -> class. split_norms.py enters `SplitMABN2d`.
    FORMS: ClassVar[dict[bool, type["MABN2d"]]] = {}

    split_batch = False
    # eps of the stock norm that a fold becomes: a state dict can't tell it. `convert_mabn` sets it to
    # that of the BatchNorm; what is built with MABN has Detectron2's and torch's default.
    stock_eps: float = 1e-5
    _version = 2
    # The loss scale of what is in buffer_gz, None if not known: see loss_scale.py.
    _window_scale: float | None = None

    eps: float
    momentum: float
    batch_size: int
    simulated_batch_size: int
    warmup_iters: int
    clip_start: int
    clip_limit: float
    running_var: torch.Tensor
    buffer_x2: torch.Tensor
    buffer_gz: torch.Tensor
    iters: torch.Tensor
    rejected: torch.Tensor

    def __new__(cls, *args: Any, split_batch: bool | None = None, **kwargs: Any) -> "MABN2d":
        if split_batch and cls is cls.FORMS[False]:
            cls = cls.FORMS[True]
        return super().__new__(cls)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.98,
        batch_size: int = 2,
        simulated_batch_size: int = 32,
        warmup_iters: int = 100,
        clip_start: int = 1000,
        clip_limit: float = 5.0,
        activation: str | None = None,
        *,
        split_batch: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, device, dtype)
        if split_batch is not None and bool(split_batch) != self.split_batch:
            raise ValueError(
                f"{type(self).__name__} has split_batch={self.split_batch}, got {split_batch}"
            )
        if activation not in (None, "relu"):
            raise ValueError(f'activation must be None or "relu", got {activation!r}')
        self.activation = activation
        self.register_buffer("running_var", self._empty_statistics(num_features))
        self.register_buffer("buffer_x2", self._empty_statistics(0, num_features))
        self.register_buffer("buffer_gz", self._empty_statistics(0, num_features))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.int64, device=device))
        rejected = torch.zeros(1, dtype=torch.int64, device=device)
        self.register_buffer("rejected", rejected, persistent=False)
        self._forget_forwards()
        self.configure(
            eps=eps,
            momentum=momentum,
            batch_size=batch_size,
            simulated_batch_size=simulated_batch_size,
            warmup_iters=warmup_iters,
            clip_start=clip_start,
            clip_limit=clip_limit,
        )
        self.reset_parameters()

    def configure(self, split_batch: bool | None = None, **settings: Any) -> None:
        """Set any of the constructor's arguments from eps to clip_limit, or split_batch.

        A window of another length or form starts empty. Nothing changes if an argument is wrong.

        Args:
            split_batch: whether the layer becomes a `SplitMABN2d`, in place, or an ordinary MABN2d
                again. None leaves the form as it is.
            settings: see the constructor.

        Raises:
            TypeError: for an unknown setting, or another form of a class derived from these two.
            ValueError: for a setting out of range.
        """
        other_form = split_batch is not None and bool(split_batch) != self.split_batch
        if other_form and type(self) not in self.FORMS.values():
            raise TypeError(f"{type(self).__name__} cannot change split_batch")
        super().configure(**settings)
        if other_form:
            self.__class__ = self.FORMS[bool(split_batch)]
            self.reset_windows()
            self._apply_settings()

    def _check_settings(self, new: dict[str, Any]) -> None:
        batch_size, simulated = new["batch_size"], new["simulated_batch_size"]
        if batch_size < 1 or simulated < 1 or simulated % batch_size:
            raise ValueError(
                f"simulated_batch_size ({simulated}) must be a positive multiple of batch_size "
                f"({batch_size})"
            )
        check_ranges(
            new,
            {
                "eps": 0 < new["eps"] < math.inf,
                "momentum": 0 <= new["momentum"] <= 1,
                "warmup_iters": new["warmup_iters"] >= 0,
                "clip_start": new["clip_start"] >= 0,
                "clip_limit": new["clip_limit"] >= 1,
            },
        )

    def _apply_settings(self) -> None:
        window = self.simulated_batch_size // self.batch_size
        if window != len(self.buffer_x2):
            self.buffer_x2 = self.buffer_x2.new_zeros(window, self.num_features)
            self.buffer_gz = self.buffer_gz.new_zeros(window, self.num_features)
            self.reset_windows()
        # The settings as every backend takes them.
        self._schedule = (
            self.eps,
            self.momentum,
            *self._thresholds(window),
            self.clip_limit,
        )

    def _thresholds(self, window: int) -> tuple[int, int]:
        """Return the last iteration that uses its own statistics, and the last with r = 1."""
        return max(window, self.warmup_iters - 1), max(self.clip_start, self.warmup_iters)

    def scale_schedule(self, forwards: int) -> None:
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
    def _group_size(self) -> int:
        """The images in a normalization batch of the split form, or 0: all images of an input."""
        return self.batch_size if self.split_batch else 0

    @property
    def window(self) -> int:
        """m, the number of iterations, or groups, that the windows span."""
        return len(self.buffer_x2)

    @property
    def last(self) -> Statistics | None:
        """The Statistics of the newest training forward, or None; none under torch.compile."""
        return Statistics(*self._records[0]) if self._records else None

    def reset_windows(self) -> None:
        """Empty both windows and set the counter back with them; running_var stays."""
        # The windows' rows are read only once the counter says that all of them are written.
        for buffer in (self.buffer_x2, self.buffer_gz, self.iters, self.rejected):
            buffer.zero_()

    def reset_running_stats(self) -> None:
        """Reset windows, counter and running_var."""
        self.reset_windows()
        self.running_var.fill_(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x: (N, C, H, W) -> the same shape, dtype and memory format.

        Args:
            x: any N, H, W, zero too.

        Raises:
            ValueError: if x is not (N, num_features, H, W).
        """
        check_input(self.num_features, x)
        relu = self.activation is not None
        if not (self.training and self.weight.requires_grad) or x.numel() == 0:
            return functional.mabn_eval(x, self.weight, self.bias, self.running_var, self.eps, relu)
        x = dense(x)
        backend = select_backend(x, self.buffer_x2)
        if not torch.compiler.is_compiling() and self._records and functional.in_backward():
            y = self._repeat(backend, x)
            if y is not None:
                return y
        y, statistics = backend.mabn(
            x,
            self.weight,
            self.bias,
            self.buffer_gz,
            self.buffer_x2,
            self.running_var,
            self.iters,
            self.rejected,
            *self._schedule,
            torch.is_grad_enabled(),  # whether it moves the state
            relu,
            self._group_size,
        )
        if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
            self._records.appendleft(statistics)
            self._repetitions.appendleft(None)
        return y

    def _forget_forwards(self) -> None:
        # The Statistics of the last forwards, the newest first, and how often each has been repeated
        # (1,), None for never.
        self._records: deque[Sequence[torch.Tensor]] = deque(maxlen=MAX_RECORDS)
        self._repetitions: deque[torch.Tensor | None] = deque(maxlen=MAX_RECORDS)

    def _repeat(self, backend: Any, x: torch.Tensor) -> torch.Tensor | None:
        """Repeat a forward for activation checkpointing; return None if x is like none on record.

        The record is found on the device: that whose x2 is nearest. If the same input came several
        times, it is one that was counted, unless checkpointing is reentrant, of these the one that
        was repeated least often, of these the newest, because a backward runs through the forwards
        in reverse. A forward without gradients was not counted, such as the first one of reentrant
        checkpointing: it is now, once, unless this one has no gradients either, as inside of
        another checkpoint.
        """
        with_gradients = torch.is_grad_enabled()
        with torch.no_grad():
            x2 = mean_square(backend, x, self._group_size)
            records = {i: Statistics(*record) for i, record in enumerate(self._records)}
            records = {
                i: r for i, r in records.items() if (r.x2.shape, r.x2.dtype) == (x2.shape, x2.dtype)
            }
            if not records:
                return None
            stacked = Statistics(*map(torch.stack, zip(*records.values(), strict=True)))
            distance = (stacked.x2.nan_to_num() - x2.nan_to_num()).abs().flatten(1).sum(1)
            never = distance.new_zeros(1)
            times = torch.cat(
                [never if (n := self._repetitions[i]) is None else n for i in records]
            )
            # Those last that can't be the forward, such as an evaluation of the same input.
            reentrant = functional.is_reentrant()
            order = times + (stacked.counted.flatten() == reentrant) * 1e6
            nearest = torch.where(distance == distance.min(), order, torch.inf).argmin(
                0, keepdim=True
            )
            first = Statistics(*(field.index_select(0, nearest)[0] for field in stacked))
            new = ~first.counted & (times.index_select(0, nearest) == 0) & with_gradients
            for i, repeated in zip(
                records, times.index_add(0, nearest, never + with_gradients).split(1), strict=True
            ):
                self._repetitions[i] = repeated
            finite = functional.is_finite(x2.flatten())
            state = self.buffer_x2, self.running_var, self.iters
            _, _, slot, _ = torch_ops.advance(x2, finite & new, *state, *self._schedule, True)
            self.rejected.add_(~finite & new)
            slot = torch.where(new, slot, first.slot)
        return backend.mabn_given(
            x,
            self.weight,
            self.bias,
            self.buffer_gz,
            first.var,
            first.r,
            slot,
            first.use_batch_stats,
            self.eps,
            self.activation is not None,
            self._group_size,
        )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, key in self.WINDOW_KEYS.items():
            destination[prefix + key] = destination.pop(prefix + name)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        version = local_metadata.get("version") or 1
        if version > self._version:
            error_msgs.append(
                f'"{prefix}" was written by a newer mabn_d2 (version {version} of the layer\'s state, '
                f"this one reads up to {self._version}): upgrade mabn_d2"
            )
        if version < 2:
            self._migrate_version_1(state_dict, prefix)
        if prefix + "running_var" in state_dict:  # else the caller hears what is missing
            self._fit_windows(state_dict, prefix)
        mean = state_dict.get(prefix + "running_mean")
        if mean is not None and not mean.is_meta and mean.any():
            # Python shows it once, not for each layer.
            warnings.warn(OF_BATCH_NORM, stacklevel=2)
        self._forget_forwards()
        self._window_scale = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # In no state dict, so it has no data in a layer that comes from the meta device.
        if self.rejected.device != self.running_var.device:
            self.rejected = torch.zeros_like(self.rejected, device=self.running_var.device)
        self.rejected.zero_()

    def _migrate_version_1(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Bring the shapes and names of the published layers' state to version 2, in place.

        Files of this project's version 1 have those of version 2 already.
        """
        c = self.num_features
        for name in ("weight", "bias", "running_var"):
            value = state_dict.get(prefix + name)
            if value is not None and value.shape == (1, c, 1, 1):
                state_dict[prefix + name] = value.reshape(c)
        for name in ("buffer_x2", "buffer_gz", "pre_x2", "pre_gz"):
            value = state_dict.get(prefix + name)
            if value is not None and value.shape[1:] == (1, c, 1, 1):
                state_dict[prefix + name] = value.reshape(-1, c)
        if prefix + "iters" in state_dict:
            state_dict[prefix + "iters"] = state_dict[prefix + "iters"].reshape(-1)
        state_dict.pop(prefix + "sta_matrix", None)

    def _fit_windows(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Give the windows their names in this layer; if they do not fit, they start empty."""
        found = {name: state_dict.pop(prefix + key, None) for name, key in self.WINDOW_KEYS.items()}
        # Windows over groups and windows over iterations are different things.
        for form in MABN2d.FORMS.values():
            for key in form.WINDOW_KEYS.values():
                state_dict.pop(prefix + key, None)
        found["iters"] = state_dict.pop(prefix + "iters", None)
        own = {name: getattr(self, name) for name in found}
        misfits = [k for k, v in found.items() if v is None or v.shape != own[k].shape]
        if misfits:
            if any(value is not None for value in found.values()):
                _logger.warning(MISFIT, f"{prefix}{misfits[0]}", self.window)
            # A layer on the meta device gets its state by assignment.
            like = state_dict[prefix + "running_var"]
            found = {
                name: torch.zeros_like(value, device=like.device if value.is_meta else None)
                for name, value in own.items()
            }
        state_dict.update({prefix + name: value for name, value in found.items()})

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._forget_forwards()
        return self

    def __getstate__(self) -> dict[str, Any]:
        empty: deque[Any] = deque(maxlen=MAX_RECORDS)
        return {**self.__dict__, "_records": empty, "_repetitions": empty.copy()}

    def __prepare_scriptable__(self) -> "MABN2d":
        """Refuse torch.jit.script, which calls this."""
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: fold the norms first, "
            "torch.jit.script(mabn_d2.fold_mabn(model.eval()))"
        )

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        return f"{shown}, activation={self.activation}" if self.activation else shown


MABN2d.FORMS[False] = MABN2d
