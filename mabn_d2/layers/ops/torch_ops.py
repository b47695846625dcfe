"""The torch backend: MABN in torch's own kernels, on every device and in every floating dtype.

It takes more passes and launches than the compiled backends. They are tested against it, and it
serves wherever they cannot.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .. import functional, functional_split
from . import torch_passes
from .torch_passes import affine, combine, product_sums, square_sums

__all__ = [
    "NAME",
    "advance",
    "affine",
    "combine",
    "mabn",
    "mabn_given",
    "product_sums",
    "square_sums",
    "unavailable",
    "unsupported",
]

NAME = "torch"


def unavailable() -> None:
    """Return None: this backend is always there."""


def unsupported(*tensors: torch.Tensor) -> None:
    """Return None: this backend takes every tensor."""


def mabn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    psi_window: torch.Tensor,
    window: torch.Tensor,
    running_var: torch.Tensor,
    iters: torch.Tensor,
    rejected: torch.Tensor,
    eps: float,
    momentum: float,
    batch_stats_iters: int,
    no_renorm_iters: int,
    clip_limit: float,
    update_state: bool,
    relu: bool,
    batch_size: int = 0,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Run a whole layer in training; the result has a gradient, once differentiable.

    Args:
        x: (N, C, H, W), dense and not empty.
        weight, bias: (C,), any floating dtype.
        psi_window: (m, C), which the backward moves.
        window, running_var, iters, rejected: the rest of the state: (m, C), (C,), (1,), (1,).
        eps, momentum, clip_limit: see MABN2d.
        batch_stats_iters: up to this iteration statistics are those of the batch itself.
        no_renorm_iters: up to this iteration r is 1.
        update_state: whether this forward moves the state.
        relu: whether y is behind a ReLU.
        batch_size: images in a normalization batch of the split form, or 0: all of x.

    Returns:
        y, like x, and the six fields of `Statistics` (mabn.py) as anything that unpacks to them.
    """
    with torch.no_grad():
        x2 = functional_split.mean_square(torch_passes, x, batch_size)
        finite = functional.is_finite(x2.flatten())
        var, r, slot, use_batch_stats = advance(
            x2,
            finite,
            window,
            running_var,
            iters,
            eps,
            momentum,
            batch_stats_iters,
            no_renorm_iters,
            clip_limit,
            update_state,
        )
        if update_state:
            rejected.add_(~finite)
        counted = torch.full_like(finite, update_state)
    y = mabn_given(
        x, weight, bias, psi_window, var, r, slot, use_batch_stats, eps, relu, batch_size
    )
    return y, (x2, var, r, slot, use_batch_stats, counted)


def mabn_given(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    psi_window: torch.Tensor,
    var: torch.Tensor,
    r: torch.Tensor,
    slot: torch.Tensor,
    use_batch_stats: torch.Tensor,
    eps: float,
    relu: bool,
    batch_size: int = 0,
) -> torch.Tensor:
    """Return `mabn`'s y for statistics that are given; it moves no state but psi_window.

    Activation checkpointing repeats a forward this way. So it saves the same tensors for the backward
    as `mabn` does: same number, order, shapes and dtypes.

    Args:
        var, r, slot, use_batch_stats: the fields of `Statistics`.
        x, weight, bias, psi_window, eps, relu, batch_size: see `mabn`.
    """
    if batch_size:
        return functional_split.mabn_groups(
            x, weight, bias, var, r, eps, psi_window, slot, use_batch_stats, batch_size, relu
        )
    return functional.mabn_train(
        x, weight, bias, var, r, eps, psi_window, slot, use_batch_stats, relu
    )


def advance(
    x2: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Call `functional.advance` for x2 (C,), `functional_split.advance_groups` for x2 (G, C)."""
    compiling = torch.compiler.is_compiling()
    if x2.dim() == 1:
        function = functional.advance_op if compiling else functional.advance
    else:
        function = (
            functional_split.advance_groups_op if compiling else functional_split.advance_groups
        )
    return function(x2, *arguments)
