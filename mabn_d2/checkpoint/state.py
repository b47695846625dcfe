"""State dicts: out of what they are wrapped in, into MABN's form, checked against a model's."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ..layers import center_weight
from .io import CheckpointError

WINDOWS = ("buffer_x2", "buffer_gz", "iters")  # of MABN2d, kept together or not at all
CLASSIFICATION_WINDOWS = ("pre_x2", "pre_gz", "sta_matrix")
EPS = 1e-5  # of MABN2d, torch's and Detectron2's BatchNorm alike

# What training programs keep a state dict under, in the order of preference.
WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state", "model_ema", "ema_state_dict")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
_AVERAGED = "n_averaged"  # what torch's AveragedModel has beside the entries of `module.`

_logger = logging.getLogger(__name__)


def listed(names: Iterable[str], limit: int = 6) -> str:
    """Return "a, b, ... and 3 more"."""
    names = sorted(names)
    more = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def unwrap(checkpoint: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return (state dict of CPU tensors without `module.`, names of the entries beside it).

    Raises:
        CheckpointError: if there is no state dict, or something in it is no tensor.
    """
    beside = []
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(
            f"the file holds {type(checkpoint).__name__}, no state dict: save model.state_dict()"
        )
    key = wrapper(checkpoint) or ("blobs" if isinstance(checkpoint.get("blobs"), Mapping) else None)
    if key:
        beside = [str(name) for name in checkpoint if name != key]
        checkpoint = checkpoint[key]
    state = tensors(checkpoint)
    if _AVERAGED in checkpoint and _AVERAGED not in state:
        beside.append(_AVERAGED)
    return state, beside


def wrapper(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the key under which a checkpoint has its state dict; None if it is one itself."""
    for key in WRAPPERS:
        if isinstance(checkpoint.get(key), Mapping):
            return key
    return None


def tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return a state dict with arrays made tensors, without the prefixes of wrapping modules.

    Raises:
        CheckpointError: if it is empty or something in it is no tensor.
    """
    result, wrong = {}, []
    for name, value in state.items():
        if isinstance(value, (np.ndarray, np.generic)):
            value = torch.as_tensor(value.astype(value.dtype.newbyteorder("="), copy=False))
        if not isinstance(name, str) or not _is_dense(value):
            wrong.append(f"{name} ({type(value).__name__})")
        result[name] = value
    if wrong or not result:
        what = f"entries that are no tensors: {listed(wrong)}" if wrong else "no entries"
        raise CheckpointError(f"the state dict has {what}; it must be a model's state_dict()")
    for prefix in _PREFIXES * 2:  # either may be outside
        while result.keys() - {_AVERAGED} and all(
            name.startswith(prefix) for name in result if name != _AVERAGED
        ):
            result.pop(_AVERAGED, None)
            result = {name.removeprefix(prefix): value for name, value in result.items()}
    return result


def _is_dense(value: Any) -> bool:
    """Return True if the storage is at least as large as the shape implies (no expanded tensor)."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def rename(
    state: Mapping[str, torch.Tensor], name_of: Callable[[str], str | None]
) -> dict[str, torch.Tensor]:
    """Return {name_of(name): value}.

    Raises:
        CheckpointError: listing names that `name_of` returns None for, or one name for two.
    """
    renamed: dict[str, torch.Tensor] = {}
    source: dict[str, str] = {}
    unknown, twice = [], []
    for name, value in state.items():
        new = name_of(name)
        if new is None:
            unknown.append(name)
        elif new in renamed:
            twice.append(f"{source[new]} and {name}")
        else:
            renamed[new], source[new] = value, name
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} entries that no rule knows: {listed(unknown)}; remove them, or "
            "convert the kind of model that they belong to"
        )
    if twice:
        raise CheckpointError(f"two entries of one name: {listed(twice)}; remove one of each")
    return renamed


def to_mabn(
    state: Mapping[str, torch.Tensor], keep_buffers: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, list[str]], bool]:
    """Bring every norm `X.norm` behind a convolution `X` to MABN's form.

    running_var stays; the windows and their counter are kept together, or dropped together so that
    they start empty and are not read before they are full. The filters in front of a BatchNorm are
    centred; what that does not take of its mean is folded into the bias. Where they were not
    centred before, the result is another function, of which a warning tells.

    Args:
        state: {Detectron2 name: tensor}.
        keep_buffers: keep `buffer_x2`, `buffer_gz` (m, C) and `iters` (1,).
    Returns:
        (state, {rule: names dropped by it}, whether `running_var` has to be recalibrated).
    Raises:
        CheckpointError: if windows are to be kept that are not all there, or a norm lacks entries.
    """
    state = dict(state)
    dropped: dict[str, list[str]] = {}

    def drop(rule: str, *names: str) -> None:
        dropped.setdefault(rule, []).extend(
            name for name in names if state.pop(name, None) is not None
        )

    centred = []
    for norm in sorted({name.rpartition(".")[0] for name in state if ".norm." in name}):
        conv = norm.removesuffix(".norm")
        for entry in ("weight", "bias", "running_var", "running_mean"):
            value = state.get(f"{norm}.{entry}")
            if value is not None and value.shape == (1, value.numel(), 1, 1):
                state[f"{norm}.{entry}"] = value.reshape(-1)
        drop("BatchNorm's counter", f"{norm}.num_batches_tracked")
        windows = [f"{norm}.{entry}" for entry in WINDOWS]
        if keep_buffers:
            lacking = [name for name in windows if name not in state]
            if lacking:
                raise CheckpointError(
                    f"no {listed(lacking)} to keep: leave --keep-buffers out, so that the windows "
                    "start empty"
                )
            for name in windows[:2]:
                if state[name].dim() > 2:
                    state[name] = state[name].flatten(1)
        else:
            drop("windows and counters, which start over", *windows)
        drop(
            "windows of the classification form",
            *(f"{norm}.{entry}" for entry in CLASSIFICATION_WINDOWS),
        )
        if _fold_mean(state, conv, drop):
            centred.append(conv)
    if centred:
        _logger.warning(
            f"{len(centred)} norms are BatchNorm: the filters in front of them are centred, which "
            "CHANGES what the model computes. A training that starts from the file recalibrates it "
            "first; for other use, recalibrate it (update_mabn_stats). Published experience: "
            "fine-tuning from weights that were not trained centred reached 19.6 AP instead of 36."
        )
    return state, {rule: names for rule, names in dropped.items() if names}, bool(centred)


def _fold_mean(state: dict[str, torch.Tensor], conv: str, drop: Callable[..., None]) -> bool:
    """Fold running_mean and the convolution's bias into the norm's bias.

    Returns:
        True of a BatchNorm behind filters that were not centred: what it computes changes.
    """
    names = [
        f"{conv}.{entry}" for entry in ("weight", "norm.weight", "norm.bias", "norm.running_var")
    ]
    mean, shift = state.get(f"{conv}.norm.running_mean"), state.get(f"{conv}.bias")
    changes = False
    if mean is not None or (shift is not None and shift.any()):
        lacking = [name for name in names if name not in state]
        if lacking:
            raise CheckpointError(f"a norm that lacks {listed(lacking)}: use a whole checkpoint")
        filters, weight, bias, var = (state[name].double() for name in names)
        vectors = [v for v in (weight, bias, var, mean, shift) if v is not None]
        if filters.dim() != 4 or any(v.shape != filters.shape[:1] for v in vectors):
            raise CheckpointError(f"{conv} and its norm have entries of different shapes")
        offset = torch.zeros_like(bias) if shift is None else shift.double()
        if mean is not None:
            own = _own_means(filters)
            changes = bool(own.any())
            offset = -_mean_left(own, mean - offset, var + EPS)
            state[names[0]] = center_weight(filters).float()
        state[names[2]] = (bias + weight * offset / (var + EPS).sqrt()).float()
    drop("means of BatchNorm, zero or folded into biases", f"{conv}.norm.running_mean")
    drop("biases in front of a norm, zero or folded into its own", f"{conv}.bias")
    return changes


def convert_batch_norms(
    state: Mapping[str, torch.Tensor], norms: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Convert the BatchNorms `norms` of a state dict to MABN's form: centred filters, mean folded.

    Args:
        state: {Detectron2 name: tensor}.
        norms: names such as "backbone.bottom_up.stem.conv1.norm", each behind the convolution that
            has the name without ".norm".
    Returns:
        A new state dict. What it computes differs: `running_var` belongs to the filters that were
        not centred, and must be recalibrated.
    Raises:
        CheckpointError: for a norm with another name, or one that lacks entries.
    """
    state = dict(state)

    def drop(rule: str, *names: str) -> None:
        for name in names:
            state.pop(name, None)

    for norm in norms:
        conv = norm.removesuffix(".norm")
        if conv == norm or f"{conv}.weight" not in state:
            raise CheckpointError(
                f"{norm} can't be converted while it is loaded, as the convolution in front is not "
                "known by its name: start this part from random weights"
            )
        drop("", f"{norm}.num_batches_tracked")
        _fold_mean(state, conv, drop)
    return state


def has_centred_filters(filters: torch.Tensor) -> bool:
    """Return whether every filter of a weight (O, I, kH, kW) has mean zero, up to rounding."""
    return filters.dim() == 4 and not _own_means(filters.double()).any()


def _own_means(filters: torch.Tensor) -> torch.Tensor:
    """Return the means (O,) of filters (O, I, kH, kW); exactly 0 of those that are centred."""
    means = filters.mean((1, 2, 3))
    return torch.where(means.abs() > 1e-5 * filters.abs().mean(), means, 0)


def _mean_left(own: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    """Return an estimate of the mean (O,) that a convolution's outputs keep when it is centred.

    An output is that of the centred filter plus the filter's `own` mean times the sum s of the
    patch, so mean = mean_left + own * E[s]. E[s] is not in a checkpoint, but it is the same for
    all filters: least squares over them, in units of their outputs' deviation, estimate it. Filters
    that are centred already keep the whole mean. (On classifiers of digits this came out ahead of
    folding all or none of the mean: docs/weights.md.)
    """
    total = (own * own / var).sum()
    return mean - own * (mean * own / var).sum() / total if total > 0 else mean


def check(
    state: dict[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return `state` in the dtypes of a model's `expected` state dict, after a comparison with it.

    Windows may be missing, and of any length.

    Raises:
        CheckpointError: listing entries that are missing, too many, of another shape or kind, not
            finite, or negative variances and counters.
    """
    optional = {name for name in expected if name.rpartition(".")[2] in WINDOWS}
    missing = expected.keys() - optional - state.keys()
    unknown = state.keys() - expected.keys()
    if missing or unknown:
        parts = [f"{len(missing)} missing: {listed(missing)}"] if missing else []
        parts += [f"{len(unknown)} of no such model: {listed(unknown)}"] if unknown else []
        raise CheckpointError(f"entries {'; '.join(parts)}; use a whole checkpoint of the model")
    wrong = [
        f"{name} {tuple(value.shape)}, not {tuple(expected[name].shape)}"
        for name, value in state.items()
        if _shape(name, value) != _shape(name, expected[name])
    ]
    if len({value.shape[0] for name, value in state.items() if name.endswith(WINDOWS[:2])}) > 1:
        wrong.append("windows of different lengths")
    if wrong:
        raise CheckpointError(f"shapes that don't fit the model: {listed(wrong)}")
    bad = []
    for name, value in state.items():
        dtype = expected[name].dtype
        good = value.is_floating_point() == dtype.is_floating_point and not value.is_complex()
        good = good and bool(value.isfinite().all())
        if not dtype.is_floating_point or name.endswith("running_var"):
            good = good and bool((value >= 0).all())
        if good:
            state[name] = value.to(dtype).contiguous()
        else:
            bad.append(name)
    if bad:
        raise CheckpointError(
            f"values that are NaN, infinite, negative where they can't be, or of another kind: "
            f"{listed(bad)}; use a checkpoint from before training diverged"
        )
    return state


def _shape(name: str, value: torch.Tensor) -> tuple[int | str, ...]:
    """Return the shape that an entry must have: windows are of any length."""
    shape = tuple(value.shape)
    return ("m", *shape[1:]) if name.endswith(WINDOWS[:2]) else shape
