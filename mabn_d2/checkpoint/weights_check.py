"""Whether the weights of a file belong to a model. This is decided before any of them is loaded."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from .io import CheckpointError
from .state import WINDOWS, has_centred_filters, listed

# Entries that a model makes by itself, so that a file may lack them.
OPTIONAL = re.compile(
    r"(.+\.)?(" + "|".join(WINDOWS) + r"|pre_x2|pre_gz|rejected|num_batches_tracked)"
    r"|pixel_mean|pixel_std|.*anchor_generator\.cell_anchors\.\d+"
)
_STATELESS_NORMS = (nn.GroupNorm, nn.LayerNorm)
_CONVERT = (
    "convert the file with tools/convert_weights.py, or set MODEL.MABN.CONVERT_WEIGHTS True "
    "(in a LazyConfig train.convert_weights=True) to convert it while it is loaded"
)


def is_mabn(norm: nn.Module) -> bool:
    """Return whether a norm divides by a second moment: it has `running_var`, but no mean."""
    return "running_var" in norm._buffers and "running_mean" not in norm._buffers


def is_batch_norm(norm: nn.Module) -> bool:
    """Return whether a norm has a running mean and variance."""
    return norm._buffers.get("running_mean") is not None and "running_var" in norm._buffers


def batch_norms_for_mabn(model: nn.Module, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the model's MABN layers for which `state` has a BatchNorm.

    A FrozenBatchNorm2d that a MABN was folded into is left out: its filters are centred and its mean
    is zero, so MABN computes the same with its entries.
    """
    names = []
    for name, norm in model.named_modules():
        mean = state.get(f"{name}.running_mean")
        if mean is None or not is_mabn(norm):
            continue
        filters = state.get(f"{name.removesuffix('.norm')}.weight")
        folded = filters is not None and not mean.any() and has_centred_filters(filters)
        if not folded:
            names.append(name)
    return names


def check_norms(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Check that each norm of the model gets the entries of a norm of its own kind.

    Args:
        state: entries by the model's names; BatchNorm that is to be converted is converted.
        source: the file, for messages.
    Raises:
        CheckpointError: if a norm would load entries of another kind.
    """
    batch_norm = batch_norms_for_mabn(model, state)
    if batch_norm:
        raise CheckpointError(
            f"{source} has BatchNorm where the model has MABN ({_count(batch_norm)}), and so filters "
            f"that are not centred: {_CONVERT}"
        )
    no_statistics: list[str] = []
    mabn: dict[str, list[str]] = {}
    other: dict[str, list[str]] = {}
    for name, norm in model.named_modules():
        in_file = {
            entry
            for entry in ("weight", "running_mean", "running_var")
            if f"{name}.{entry}" in state
        }
        if is_mabn(norm) and in_file == {"weight"}:
            no_statistics.append(name)
        elif isinstance(norm, _STATELESS_NORMS) or is_batch_norm(norm):
            if "running_var" in in_file and "running_mean" not in in_file:
                mabn.setdefault(type(norm).__name__, []).append(name)
            elif isinstance(norm, _STATELESS_NORMS) and "running_mean" in in_file:
                other.setdefault(type(norm).__name__, []).append(name)
    if no_statistics:
        raise CheckpointError(
            f"{source} has norms without statistics where the model has MABN "
            f"({_count(no_statistics)}), such as GroupNorm or BatchNorm merged into its weights: use "
            "weights with running_var, such as detectron2://ImageNetPretrained/torchvision/R-50.pkl, "
            "and convert them with tools/convert_weights.py"
        )
    for kind, names in mabn.items():
        raise CheckpointError(
            f"{source} has MABN where the model has {kind} ({_count(names)}): set NORM to "
            '"MABN" there, or convert the file with "tools/convert_weights.py fold" and use the '
            "config that it prints"
        )
    for kind, names in other.items():
        raise CheckpointError(
            f"{source} has BatchNorm where the model has {kind} ({_count(names)}): use weights that "
            f"were trained with {kind}, or change NORM"
        )
    _check_left_out(model, state, source)


def _check_left_out(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Check that no convolution is loaded without the norm that it was trained with.

    Nothing else shows it where convolutions have no bias, as in Detectron2's ResNet: then the model
    has all that it expects.
    """
    own = model.state_dict()
    modules = {name for name, _ in model.named_modules()}
    left_out = [
        norm
        for norm in (
            name.removesuffix(".weight") for name in state if name.endswith(".norm.weight")
        )
        if norm not in modules
        and (conv := f"{norm.removesuffix('.norm')}.weight") in own
        and conv in state
        and own[conv].shape == state[conv].shape
    ]
    if left_out:
        mean = any(f"{norm}.running_mean" in state for norm in left_out)
        mabn = not mean and all(f"{norm}.running_var" in state for norm in left_out)
        theirs, value = ("MABN", '"MABN"') if mabn else ("norms", "that of the weights")
        raise CheckpointError(
            f"{source} has {theirs} where the model has no norm ({_count(left_out)}): set NORM there "
            f"to {value}, for the ResNet MODEL.RESNETS.NORM"
        )


def check_values(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Check the numbers that the model would take from `state`.

    Raises:
        CheckpointError: for values that are NaN or infinite, or a variance below zero.
    """
    bad = []
    for name in model.state_dict():
        value = state.get(name)
        if value is None or not value.is_floating_point():
            continue
        finite = bool(value.isfinite().all())
        if not finite or (name.endswith("running_var") and bool((value < 0).any())):
            bad.append(name)
    if bad:
        raise CheckpointError(
            f"{source} has values that are NaN, infinite, or negative in a running_var: "
            f"{listed(bad)}; use a checkpoint from before the training diverged"
        )


def check_entries(
    model: nn.Module, state: Mapping[str, torch.Tensor], source: str, complete: bool
) -> str:
    """Compare the entries of a file with those of the model.

    Args:
        complete: whether the file must have all of them, as for an evaluation.
    Returns:
        One line with counts: what is loaded, what starts anew, what is not used.
    Raises:
        CheckpointError: if nothing fits, or if something is missing and `complete` is set.
    """
    expected = {
        name: value for name, value in model.state_dict().items() if not OPTIONAL.fullmatch(name)
    }
    shapes = {name: tuple(state[name].shape) for name in expected if name in state}
    wrong_shape = [
        f"{name} {shape} instead of {tuple(expected[name].shape)}"
        for name, shape in shapes.items()
        if shape != tuple(expected[name].shape)
    ]
    loaded = len(shapes) - len(wrong_shape)
    unused = [name for name in state if name not in expected and not OPTIONAL.fullmatch(name)]
    if loaded == 0:
        raise CheckpointError(
            f"{source}: none of its {len(state)} entries ({listed(state, 2)}) fits the model's "
            f"{len(expected)} ({listed(expected, 2)}); tools/convert_weights.py renames those of "
            "torchvision, timm's ResNets and maskrcnn-benchmark"
        )
    anew = [name for name in expected if name not in shapes] + [
        entry.partition(" ")[0] for entry in wrong_shape
    ]
    parts = [f"{source}: {loaded} of the model's {len(expected)} entries are loaded"]
    if anew:
        parts.append(f"these start anew: {_groups(anew)}")
    if wrong_shape:
        parts.append(f"of another shape: {listed(wrong_shape, 3)}")
    if unused:
        parts.append(f"not used: {_groups(unused)}")
    line = "; ".join(parts)
    if complete and anew:
        raise CheckpointError(
            f"{line}; an evaluation and a resumed run need all of them: use the config that the "
            "weights were trained with, which is config.yaml in the OUTPUT_DIR of their training"
        )
    return line


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} norms, the first {names[0]}"


def _groups(names: Iterable[str]) -> str:
    """Return names by the part of the model that they belong to, with counts."""
    counts: dict[str, int] = {}
    for name in names:
        part = ".".join(name.split(".")[:-1][:2]) or name
        part = re.sub(r"\d+$", "", part)  # fpn_lateral2, fpn_lateral3 ... are one part
        counts[part] = counts.get(part, 0) + 1
    parts = [f"{part} ({count})" for part, count in counts.items()]
    return ", ".join(parts[:8]) + (f" and {len(parts) - 8} more parts" if len(parts) > 8 else "")
