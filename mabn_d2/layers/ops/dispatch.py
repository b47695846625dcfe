"""The one door to the kernels: which backend runs a tensor.

A backend is a module: `cpu_ops` (compiled), `triton_ops` or `torch_ops`. Each has the same functions:
`mabn` and `mabn_given`, which run a whole layer with its gradient, and the passes `affine`,
`combine`, `product_sums` and `square_sums`. `torch_ops.py` documents them.

If MABN_D2_TRITON=0 is in the environment, a GPU uses torch's kernels.
"""

import logging
import os
from types import ModuleType

import torch

from . import cpu_ops, torch_ops

USE_TRITON = os.environ.get("MABN_D2_TRITON", "1") != "0"

_logger = logging.getLogger(__name__)
_logged: set[tuple[torch.device, str | None]] = set()


def select_backend(x: torch.Tensor, *others: torch.Tensor) -> ModuleType:
    """Return the backend that runs an activation; log the choice once per device and reason.

    Args:
        x: (N, C, H, W), dense and not empty.
        others: tensors of the state, which the backend must take too.
    """
    if torch.compiler.is_compiling():
        return torch_ops  # the compiler fuses torch's own kernels
    fastest, reason = _fastest(x.device.type)
    if fastest is not None and reason is None:
        reason = fastest.unavailable() or fastest.unsupported(x, *others)
    backend = torch_ops if fastest is None or reason is not None else fastest
    key = (x.device, reason)
    if key not in _logged:
        _logged.add(key)
        _log(x.device, backend, fastest, reason)
    return backend


def _fastest(device_type: str) -> tuple[ModuleType | None, str | None]:
    """Return the backend made for such devices, if there is one, and why it must not be used."""
    if device_type == "cpu":
        return cpu_ops, None
    if device_type == "cuda":
        if not USE_TRITON:
            return None, "MABN_D2_TRITON=0"
        from . import triton_ops  # imports Triton, which a CPU does not need

        return triton_ops, None
    return None, None


def _log(
    device: torch.device, backend: ModuleType, fastest: ModuleType | None, reason: str | None
) -> None:
    because = "" if reason is None else f", because {reason} (see docs/speed.md)"
    # A faster backend that only has to be installed is worth a warning.
    missing = fastest is not None and fastest.unavailable() is not None
    level = logging.WARNING if missing else logging.INFO
    _logger.log(level, f"MABN on {device}: {backend.NAME} kernels{because}")
