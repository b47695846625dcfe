"""Which operators take an activation: compiled ones on a CPU, Triton's on a GPU, or torch's own.

`cpu_ops.py` and `triton_ops.py` have the same: `product_sums`, `affine`, `combine`, and all of a layer,
with its gradient, in `mabn`. Torch's own kernels, in `torch_ops.py` and `functional.py`, do the
same in more passes and launches: they are what the others are tested against, and serve wherever
`find` returns None. MABN_D2_TRITON=0 in the environment leaves a GPU to them.

`mabn(x, weight, bias, psi_window, window, running_var, iters, rejected, eps, momentum, warmup_iters,
clip_start, clip_limit, counts, relu, batch_size=0)` returns y and the fields of `Statistics` (mabn.py): it is
`advance` and `mabn_train` of functional.py, of the state and settings of MABN2d; with the batch_size of
the split form, which the compiled ones alone have, their counterparts of split.py.
"""

import os

import torch

from . import cpu_ops

USE_TRITON = os.environ.get("MABN_D2_TRITON", "1") != "0"


def find(x, *others, split=False):
    """Return the operators for an activation x and tensors like `others`, or None: torch's own.

    Args:
        split: whether `mabn` of the split form is wanted, which Triton's have not.
    """
    if torch.compiler.is_compiling():
        return None  # the compiler fuses what torch's own do
    if cpu_ops.takes(x, *others):
        return cpu_ops.OPERATORS
    if x.is_cuda and USE_TRITON and not split:
        from . import triton_ops  # imports Triton, which a CPU has no use for

        if triton_ops.takes(x, *others):
            return triton_ops
    return None
