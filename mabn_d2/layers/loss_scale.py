"""MABN's gradient windows under a loss scale that changes."""

import torch
from torch import nn

from .mabn import MABN2d


def rescale_mabn_windows(
    model: nn.Module, scaler: torch.amp.GradScaler, before: float | None = None
) -> float:
    """Bring MABN's gradient windows to the present loss scale; call it after `scaler.update()`.

    The windows `buffer_gz` hold psi of the last m iterations, and psi has the scale of the loss. So after
    a change of the scale psi's mean would be wrong for m iterations, and with it the gradient of x.
    A scaler that is disabled has the scale 1.

    Args:
        model: a module with MABN2d layers, or one around it, such as DistributedDataParallel.
        scaler: what scales the losses of `model`. In a run that is resumed, load its state before.
        before: the scale that the windows have. None: that of the last call. At the first call for a
            layer, or the first one after a state was loaded, it is the scale that the scaler began with.

    Returns:
        The present scale, which the windows now have.
    """
    scale = scaler.get_scale()
    # A scaler begins with an argument of its constructor, or with what was loaded.
    first = getattr(scaler, "_init_scale", scale)
    for norm in model.modules():
        if isinstance(norm, MABN2d):
            known = first if norm._window_scale is None else norm._window_scale
            old = known if before is None else before
            if old != scale:
                norm.buffer_gz.mul_(scale / old)
            norm._window_scale = scale
    return scale
