"""The compiled operators of `csrc`, where this installation has them (see setup.py).

They do on a CPU what torch has no single kernel for: `normalize` and `normalize_backward` are all of
a MABN layer in one call each way, `product_sums`, `affine` and `combine` its passes.
"""

import importlib.util

import torch


def _load():
    spec = importlib.util.find_spec("mabn_d2.layers._native")
    if spec is None:
        return None
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        raise ImportError(
            f"{spec.origin} does not fit torch {torch.__version__}: install mabn_d2 again"
        ) from error
    return torch.ops.mabn_d2_cpu


OPERATORS = _load()  # None where there are none


def takes(*tensors):
    """Return whether the operators take activations like these, dense and not empty."""
    return (
        OPERATORS is not None
        and all(x.device.type == "cpu" for x in tensors)
        and all(x.dtype in (torch.float32, torch.bfloat16) for x in tensors)
    )
