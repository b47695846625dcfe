"""The split form's statistics enter its window once for each forward."""

from typing import Any

import torch


def refuse_second_backward(ctx: Any) -> None:
    """Raise RuntimeError if the backward of `ctx` has run before: its groups are in the window.

    csrc/layer.cpp has the same check.
    """
    if torch.compiler.is_compiling():
        return
    if getattr(ctx, "done", False):
        raise RuntimeError(
            "SplitMABN2d has no second backward through the same forward, which would count its "
            "statistics twice: call backward once, of the sum of the losses"
        )
    ctx.done = True
