"""State dicts: out of what they are wrapped in, into MABN's form, checked against a model's."""

import logging
from collections.abc import Mapping

import numpy as np
import torch

from ..layers import center_weight
from .io import CheckpointError

WINDOWS = ("buffer_x2", "buffer_gz", "iters")  # of MABN2d, kept together or not at all
CLASSIFICATION_WINDOWS = ("pre_x2", "pre_gz", "sta_matrix")
EPS = 1e-5  # of MABN2d, torch's and Detectron2's BatchNorm alike

_logger = logging.getLogger(__name__)


def listed(names, limit=6):
    """Return "a, b, ... and 3 more"."""
    names = sorted(names)
    more = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def unwrap(checkpoint):
    """Return (state dict of CPU tensors without `module.`, names of the entries beside it).

    Raises:
        CheckpointError: if there is no state dict, or something in it is no tensor.
    """
    beside = []
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(
            f"the file holds {type(checkpoint).__name__}, no state dict: save model.state_dict()"
        )
    for key in ("model", "state_dict", "blobs"):
        if isinstance(checkpoint.get(key), Mapping):
            beside = [str(name) for name in checkpoint if name != key]
            checkpoint = checkpoint[key]
            break
    state, wrong = {}, []
    for name, value in checkpoint.items():
        if isinstance(value, (np.ndarray, np.generic)):
            value = torch.as_tensor(value.astype(value.dtype.newbyteorder("="), copy=False))
        if not isinstance(name, str) or not _is_dense(value):
            wrong.append(f"{name} ({type(value).__name__})")
        state[name] = value
    if wrong or not state:
        what = f"entries that are no tensors: {listed(wrong)}" if wrong else "no entries"
        raise CheckpointError(f"the state dict has {what}; it must be a model's state_dict()")
    while all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state, beside


def _is_dense(value):
    """True of a tensor that owns as many numbers as it shows: no expanded one of any size."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def rename(state, name_of):
    """Return {name_of(name): value}.

    Raises:
        CheckpointError: listing names that `name_of` returns None for, or one name for two.
    """
    renamed, source, unknown, twice = {}, {}, [], []
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


def to_mabn(state, keep_buffers=False):
    """Bring every norm `X.norm` behind a convolution `X` to MABN's form.

    running_var stays; the windows and their counter are kept together, or dropped together so that
    they start empty and are not read before they are full. A BatchNorm, which has a mean mu, becomes
    y = w x / sqrt(running_var + eps) + b - w mu / sqrt(running_var + eps), behind a convolution whose
    filters are centred here; that is another function, of which a warning tells.

    Args:
        state: {Detectron2 name: tensor}.
        keep_buffers: keep `buffer_x2`, `buffer_gz` (m, C) and `iters` (1,).
    Returns:
        (state, {rule: names dropped by it}).
    Raises:
        CheckpointError: if windows are to be kept that are not all there, or a norm lacks entries.
    """
    state, dropped = dict(state), {}

    def drop(rule, *names):
        dropped.setdefault(rule, []).extend(name for name in names if state.pop(name, None) is not None)

    centred = []
    for norm in sorted({name.rpartition(".")[0] for name in state if ".norm." in name}):
        conv = norm.removesuffix(".norm")
        for entry in ("weight", "bias", "running_var", "running_mean"):
            value = state.get(f"{norm}.{entry}")
            if value is not None and value.dim() == 4 and value.numel() == value.shape[1]:
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
            channels = state[windows[0]].numel() // max(state[windows[0]].shape[0], 1)
            for name in windows[:2]:
                state[name] = state[name].reshape(-1, channels) if channels else state[name]
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
            f"{len(centred)} norms are BatchNorm: their means are folded into biases and the filters "
            "are centred, which CHANGES what the model computes. Recalibrate it (update_mabn_stats) "
            "or train it on before use. Published experience: fine-tuning from weights that were "
            "not trained centred reached 19.6 AP instead of 36."
        )
    return state, {rule: names for rule, names in dropped.items() if names}


def _fold_mean(state, conv, drop):
    """Fold running_mean and the convolution's bias into the norm's bias; True if there was any."""
    mean, shift = state.get(f"{conv}.norm.running_mean"), state.get(f"{conv}.bias")
    offset = 0
    if mean is not None and mean.any():
        offset = offset - mean
    if shift is not None and shift.any():
        offset = offset + shift
    if isinstance(offset, torch.Tensor):
        entries = [f"{conv}.norm.{entry}" for entry in ("weight", "bias", "running_var")]
        lacking = [name for name in [*entries, f"{conv}.weight"] if name not in state]
        if lacking:
            raise CheckpointError(f"a norm that lacks {listed(lacking)}: use a whole checkpoint")
        weight, bias, var = (state[name].double() for name in entries)
        if len({offset.shape, weight.shape, bias.shape, var.shape}) > 1:
            raise CheckpointError(f"{conv}.norm has entries of different shapes: use a whole file")
        state[entries[1]] = (bias + weight * offset / (var + EPS).sqrt()).float()
    drop("means of BatchNorm, zero or folded into biases", f"{conv}.norm.running_mean")
    drop("biases in front of a norm, zero or folded into it", f"{conv}.bias")
    if mean is None or not mean.any():
        return False
    if state[f"{conv}.weight"].dim() == 4:
        state[f"{conv}.weight"] = center_weight(state[f"{conv}.weight"].float())
    return True


def check(state, expected):
    """Return `state` in float32, after a comparison with a model's `expected` state dict.

    Raises:
        CheckpointError: listing entries that are missing, too many, of another shape, no numbers,
            not finite, or negative variances.
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
        if name.endswith(".iters"):
            good = not value.dtype.is_complex and bool((value >= 0).all())
            state[name] = value.long()
        else:
            good = value.is_floating_point() and bool(value.isfinite().all())
            good = good and not (name.endswith("running_var") and bool((value < 0).any()))
            state[name] = value.float().contiguous() if good else value
        if not good:
            bad.append(name)
    if bad:
        raise CheckpointError(
            f"values that are NaN, infinite, negative variances or no floating-point numbers: "
            f"{listed(bad)}; use a checkpoint from before training diverged"
        )
    return state


def _shape(name, value):
    """Return the shape that an entry must have: windows are of any length."""
    shape = tuple(value.shape)
    return ("m", *shape[1:]) if name.endswith(WINDOWS[:2]) else shape
