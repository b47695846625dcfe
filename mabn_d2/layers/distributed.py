"""Keeps MABN's windows out of the broadcast of buffers by DistributedDataParallel.

`DistributedDataParallel(model)` by default broadcasts the buffers of rank 0 before each forward
(`broadcast_buffers=True`). But the windows and the counter are about a rank's own batches: the others
would lose theirs in silence. DDP leaves out what its attribute `parameters_to_ignore` names. The
attribute is set from `_ddp_params_and_buffers_to_ignore` of the outermost module only, of which a
layer knows nothing. So a hook of torch's adds the names when DDP takes a model in.

`running_var` is broadcast, as BatchNorm's running statistics are: r is then the same on all ranks.
"""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .mabn import MABN2d

# What belongs to the batches of one rank.
RANK_BUFFERS = ("buffer_x2", "buffer_gz", "iters", "rejected")


def rank_buffers(model: nn.Module) -> set[str]:
    """Return the names of all buffers of `model` that differ between ranks on purpose."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, MABN2d)
        for name in RANK_BUFFERS
    }


def _ignore_rank_buffers(parent: nn.Module, name: str, model: nn.Module | None) -> None:
    if isinstance(parent, DistributedDataParallel) and model is not None:
        # DDP has read the names to ignore by now, and broadcasts nothing before.
        parent.parameters_to_ignore |= rank_buffers(model)


torch.nn.modules.module.register_module_module_registration_hook(_ignore_rank_buffers)
