"""The compiled CPU backend: the operators of `csrc`, if this installation has them (see setup.py).

They do in one call or one pass what torch has no single kernel for. The functions have the arguments
and results of their counterparts in `torch_ops.py`.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

NAME = "compiled CPU"
DTYPES = (torch.float32, torch.bfloat16)


INTERFACE_VERSION = 2  # of the operators' arguments and results, see layer.cpp


def _load() -> Any:
    spec = importlib.util.find_spec("mabn_d2.layers.ops._native")
    if spec is None or spec.origin is None:
        return None
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        raise ImportError(
            f"{spec.origin} does not fit torch {torch.__version__}: install mabn_d2 again"
        ) from error
    operators = torch.ops.mabn_d2_cpu
    version = operators.interface_version() if hasattr(operators, "interface_version") else 1
    if version != INTERFACE_VERSION:
        raise ImportError(
            f"{spec.origin} was built from another version of mabn_d2: install it again, or in a "
            "checkout run `python setup.py build_ext --inplace`"
        )
    return operators


OPERATORS = _load()  # None if they are not installed


def unavailable() -> str | None:
    """Return why this installation cannot use the backend, or None if it can."""
    return "the compiled operators are not installed" if OPERATORS is None else None


def unsupported(*tensors: torch.Tensor) -> str | None:
    """Return why the backend cannot take activations and windows like these, or None if it can.

    Args:
        tensors: the activation first, dense and not empty.
    """
    for x in tensors:  # not any(...): this is part of each forward
        if x.device.type != "cpu":
            return f"a tensor is on {x.device}"
        if x.dtype not in DTYPES:
            return f"the compiled operators have no {x.dtype}".replace("torch.", "")
    return None


def mabn(*arguments: Any) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """See `torch_ops.mabn`."""
    y, *statistics = OPERATORS.mabn(*arguments)
    return y, statistics


def mabn_given(*arguments: Any) -> torch.Tensor:
    """See `torch_ops.mabn_given`."""
    return OPERATORS.mabn_given(*arguments)


def affine(*arguments: Any) -> torch.Tensor:
    """See `torch_passes.affine`."""
    return OPERATORS.affine(*arguments)


def combine(*arguments: Any) -> torch.Tensor:
    """See `torch_passes.combine`."""
    return OPERATORS.combine(*arguments)


def product_sums(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """See `torch_passes.product_sums`."""
    return OPERATORS.product_sums(*arguments)


def square_sums(x: torch.Tensor, per_image: bool = False) -> torch.Tensor:
    """See `torch_passes.square_sums`."""
    return OPERATORS.product_sums(x, x, per_image)[0]
