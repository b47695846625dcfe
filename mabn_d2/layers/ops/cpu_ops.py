"""The compiled operators of `csrc`, where this installation has them (see setup.py).

They do on a CPU what torch has no single kernel for: `mabn` is a whole layer with its gradient, one
call each way, `product_sums`, `affine` and `combine` are its passes.
"""

import importlib.util

import torch


def _load():
    spec = importlib.util.find_spec("mabn_d2.layers.ops._native")
    if spec is None:
        return None
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        raise ImportError(
            f"{spec.origin} does not fit torch {torch.__version__}: install mabn_d2 again"
        ) from error
    return torch.ops.mabn_d2_cpu


DTYPES = (torch.float32, torch.bfloat16)
OPERATORS = _load()  # None where there are none


def takes(*tensors):
    """Return whether the operators take activations like these, dense and not empty."""
    if OPERATORS is None:
        return False
    for x in tensors:  # not all(...): this is part of each forward
        if x.device.type != "cpu" or x.dtype not in DTYPES:
            return False
    return True
