"""The statistics of every rank in one checkpoint, so that a resumed run equals the undisturbed one."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ...checkpoint import SafeCheckpointer

KEY = "rank_states"  # of a checkpoint; stock Detectron2 ignores it

_logger = logging.getLogger(__name__)


def gather_rank_states(model: nn.Module) -> dict[str, Any] | None:
    """Return the buffers of all ranks, on rank 0. All ranks must call it.

    Each rank has statistics of its own (DistributedDataParallel averages gradients only).

    Returns:
        {"buffers": [state dict of the buffers, for each rank]}; None on other ranks, or for one rank.
    """
    if comm.get_world_size() == 1:
        return None
    names = {name for name, _ in model.named_buffers()}
    own = {k: v.cpu() for k, v in model.state_dict().items() if _buffer_name(k) in names}
    gathered = comm.gather(own)
    return {"buffers": gathered} if comm.is_main_process() else None


def _buffer_name(name: str) -> str:
    """Return the name of a buffer in the module, for its name in the state dict."""
    return name.replace(".pre_x2", ".buffer_x2").replace(".pre_gz", ".buffer_gz")


def restore_rank_states(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Load this rank's buffers from a checkpoint; a warning where it has none of this rank."""
    ranks, rank = comm.get_world_size(), comm.get_rank()
    entry = checkpoint.get(KEY)
    states = entry.get("buffers") if isinstance(entry, Mapping) else None
    count = len(states) if isinstance(states, list) else 1
    if states and count == ranks > 1:
        model.load_state_dict(states[rank], strict=False)
    elif count != ranks and rank == 0:
        _logger.warning(
            f"the checkpoint has the statistics of {count} processes, and {ranks} resume it: each "
            "starts with those of the first; resume with as many to go on exactly"
        )


class KeepRankStates(HookBase):
    """Gathers the statistics of all ranks for the checkpoints; a hook of every rank.

    Comes before the hook that writes the checkpoint, and after those that change statistics.

    Args:
        model: the module, not the DistributedDataParallel around it.
        checkpointer: its `extra` is what the next `save` adds.
        period: of the checkpoints, in iterations.
    """

    def __init__(self, model: nn.Module, checkpointer: SafeCheckpointer, period: int) -> None:
        self.model, self.checkpointer, self.period = model, checkpointer, period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self.period == 0 or done >= self.trainer.max_iter:
            self.gather()
        else:
            self.checkpointer.extra = {}  # of another iteration

    @torch.no_grad()
    def gather(self) -> None:
        """Gather them now; all ranks must call it."""
        states = gather_rank_states(self.model)
        self.checkpointer.extra = {} if states is None else {KEY: states}
