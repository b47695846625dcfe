"""The norm types "MABN" and "BRN", everywhere that Detectron2 takes the name of a norm.

The convolution in front of "MABN" is centred; "BRN", Batch Renormalization, needs none.

Why it is done this way. `get_norm` looks names up in a dict inside of the function and modules
import the function by name, so the extended function takes its place, by identity, wherever a loaded
module holds it; modules that are loaded later find it in `detectron2.layers`. The alternatives, own
subclasses of every builder, head and meta-architecture, would leave out the next one that Detectron2
or a user adds. The norm can't centre the convolution by itself: Detectron2 attaches it to one after
it is made, so a registration hook of torch's does it at that moment, by changing the convolution's
class in place. A new module in its place would be missed by the plain lists that FPN and others keep
of the old one, a parametrization renames the checkpoint's keys, and a gradient hook is lost on
deepcopy. A norm that has found no convolution refuses to run, and `build_model` refuses to return it.
The same hook gives the heads that RetinaNet and FCOS run over all levels a norm for each of them,
which Detectron2 does for "BN" and "SyncBN" by their names.
"""

import logging
import math
import sys

import detectron2.layers
import detectron2.modeling  # noqa: F401 (its `build_model` is replaced)
from detectron2.layers import Conv2d
from detectron2.layers import get_norm as detectron2_get_norm
from detectron2.modeling import build_model as detectron2_build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.utils import comm
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..layers import BatchRenorm2d, CenConv2d, MABN2d, PerLevelNorm
from ..surgery.fuse_relu import fuse_relu

NORM = "MABN"
RENORM = "BRN"


class CenNormConv2d(CenConv2d, Conv2d):
    """Detectron2's Conv2d, which holds norm and activation, with filters centred in the forward."""

    def forward(self, x):
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        x = self._conv_forward(x, self.weight, self.bias)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


# Subclasses have forwards of their own, which centring in place would lose.
CENTRED = {nn.Conv2d: CenConv2d, Conv2d: CenNormConv2d}


def get_norm(norm, out_channels):
    """`detectron2.layers.get_norm` that knows "MABN" and "BRN" too.

    Raises:
        ValueError: for a name that neither Detectron2 nor this package has.
    """
    if norm == NORM:
        layer = MABN2d(out_channels)
        layer.register_forward_pre_hook(_refuse)
        return layer
    if norm == RENORM:
        return BatchRenorm2d(out_channels)
    try:
        return detectron2_get_norm(norm, out_channels)
    except KeyError as error:
        raise ValueError(
            f'unknown norm {norm!r}: use "MABN", "BRN", or one that detectron2.layers.get_norm lists'
        ) from error


def _refuse(layer, args):
    raise RuntimeError(
        f"{layer} has no convolution to centre: it was not attached to a Conv2d, nor put behind "
        "one in the same module"
    )


def is_unpaired(module):
    """True of a MABN layer from `get_norm` that has not been attached to a convolution yet."""
    return isinstance(module, MABN2d) and _refuse in module._forward_pre_hooks.values()


def _pair(parent, name, module):
    """Registration hook: centre the convolution that a new norm `module` is attached to."""
    if not is_unpaired(module):
        return
    conv = parent
    if not isinstance(parent, nn.Conv2d):
        siblings = [child for child in parent.children() if child is not module]
        if not siblings:
            return  # a container, which may be attached in turn
        conv = siblings[-1]
    check_conv(conv, module.num_features)
    center_conv(conv)
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _refuse]:
        del hooks[key]


def _split_levels(parent, name, module):
    """Registration hook: norms of a subnet that is attached to a RetinaNetHead become one a level."""
    if isinstance(parent, RetinaNetHead) and isinstance(module, nn.Sequential):
        for i, layer in enumerate(module):
            if isinstance(layer, (BatchRenorm2d, MABN2d)):
                module[i] = PerLevelNorm(layer, parent._num_features)


def check_conv(conv, num_features):
    """Raise if the convolution in front of a MABN over `num_features` channels can't be centred.

    Raises:
        TypeError: if it is no convolution that can be centred.
        ValueError: if its outputs are not the norm's `num_features`, or filters have one element.
    """
    cls = type(conv)
    if cls not in (*CENTRED, *CENTRED.values()):
        raise TypeError(
            f"MABN needs a zero-centred convolution in front, which {cls.__module__}."
            f"{cls.__qualname__} can't be: use one of "
            + ", ".join(f"{c.__module__}.{c.__qualname__}" for c in CENTRED)
            + ", or another norm there"
        )
    if conv.out_channels != num_features:
        raise ValueError(
            f"MABN over {num_features} channels stands behind a convolution with "
            f"{conv.out_channels} output channels: {conv}"
        )
    if conv.weight[0].numel() == 1:
        raise ValueError(f"filters of one element are zero when centred: {conv}")


def center_conv(conv):
    """Make a convolution that `check_conv` takes a centred one, in place; keys stay as they are."""
    conv.__class__ = CENTRED.get(type(conv), type(conv))


def norm_settings(cfg):
    """Return the arguments of MABN2d that the node MODEL.MABN asks for; defaults without a node.

    BATCH_SIZE 0 means the images of one forward: those of one GPU in one iteration, divided by
    SOLVER.ACCUMULATION_STEPS. The window is then rounded up to a whole number of forwards.
    WARMUP_ITERS and CLIP_START are in optimizer iterations (see `scale_norm_schedules`).

    Raises:
        ValueError: if BATCH_SIZE is given and does not divide SIMULATED_BATCH_SIZE.
    """
    node = cfg.MODEL.get("MABN")
    batch_size = node.BATCH_SIZE if node else 0
    simulated = node.SIMULATED_BATCH_SIZE if node else 32
    if batch_size == 0:
        # At least 1: a model may be built with fewer images than workers, to be looked at.
        micro_batches = comm.get_world_size() * cfg.SOLVER.get("ACCUMULATION_STEPS", 1)
        batch_size = max(cfg.SOLVER.IMS_PER_BATCH // micro_batches, 1)
        wanted, simulated = simulated, math.ceil(simulated / batch_size) * batch_size
        if simulated != wanted:
            logging.getLogger(__name__).warning(
                f"MODEL.MABN.SIMULATED_BATCH_SIZE is {wanted}, not a multiple of the {batch_size} "
                f"images of one GPU: the window spans {simulated}"
            )
    elif simulated % batch_size:
        raise ValueError(
            f"MODEL.MABN.BATCH_SIZE ({batch_size}) does not divide MODEL.MABN."
            f"SIMULATED_BATCH_SIZE ({simulated}): change one, or set BATCH_SIZE to 0, the images "
            "of one GPU"
        )
    settings = {"batch_size": batch_size, "simulated_batch_size": simulated}
    if node:
        settings |= {
            "eps": node.EPS,
            "momentum": node.MOMENTUM,
            "warmup_iters": node.WARMUP_ITERS,
            "clip_start": node.CLIP_START,
            "clip_limit": node.CLIP_LIMIT,
        }
    return settings


def renorm_settings(cfg):
    """Return the arguments of BatchRenorm2d that the node MODEL.BRN asks for; none without a node."""
    return {name.lower(): value for name, value in cfg.MODEL.get("BRN", {}).items()}


def configure_mabn(model, **settings):
    """Set the arguments of every MABN layer of a built model, and return the model.

    Args:
        settings: any of `MABN2d.configure`'s.
    Raises:
        ValueError: naming the MABN layers that have no centred convolution in front.
    """
    unpaired = [name for name, module in model.named_modules() if is_unpaired(module)]
    if unpaired:
        raise ValueError(f"MABN without a convolution to centre: {', '.join(unpaired)}")
    for module in model.modules():
        if isinstance(module, MABN2d):
            module.configure(**settings)
    return model


def scale_norm_schedules(model, accumulation_steps):
    """Let norms whose schedule is in optimizer iterations count micro-batches instead.

    Args:
        model: its norms as `configure` left them; those with a `scale_schedule` are changed.
        accumulation_steps: micro-batches in one optimizer iteration; with 1 nothing changes.
    """
    if accumulation_steps == 1:
        return
    for module in model.modules():
        if hasattr(module, "scale_schedule"):
            module.scale_schedule(accumulation_steps)


def build_model(cfg):
    """`detectron2.modeling.build_model`, its norms set by the nodes MODEL.MABN and MODEL.BRN.

    MABN layers have the ReLU behind them (`fuse_relu`).
    """
    model = detectron2_build_model(cfg)
    renorm = renorm_settings(cfg)
    for module in model.modules():
        if isinstance(module, BatchRenorm2d):
            module.configure(**renorm)
    configure_mabn(model, **norm_settings(cfg))
    scale_norm_schedules(model, cfg.SOLVER.get("ACCUMULATION_STEPS", 1))
    return fuse_relu(model)


def _replace(old, new):
    for module in list(sys.modules.values()):
        for name in [n for n, value in vars(module).items() if value is old] if module else ():
            if module.__name__ != __name__:
                setattr(module, name, new)


def register():
    """Let Detectron2 know "MABN" and "BRN"; called once, by the import of the package."""
    _replace(detectron2_get_norm, get_norm)
    _replace(detectron2_build_model, build_model)
    register_module_module_registration_hook(_pair)
    register_module_module_registration_hook(_split_levels)
