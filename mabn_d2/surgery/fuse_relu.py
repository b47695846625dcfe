"""MABN and the ReLU behind it as one layer.

`MABN2d(activation="relu")` takes about half the time of a norm and a ReLU. The ReLU stands in one of
four forms, which are fused in place so that the keys of a state dict, and the plain lists that
models keep of their parts, stay as they are:

- an argument `activation` of a convolution that holds its norm (Detectron2's Conv2d in box, mask and
  semantic segmentation heads, ASPP): an `Applied` takes its place;
- a module behind the norm, in a module that runs its children in turn (nn.Sequential; in Detectron2
  RetinaNet, FCOS, RegNet): the same, if no module above calls these children one by one, because it
  may use the norm's output;
- the activation of a norm that has one (timm's BatchNormAct2d): the same;
- a call in the forward of a block (Detectron2's ResNet): the class is exchanged for one without it.

The classes of Detectron2 are registered by `modeling`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..layers import MABN2d, PerLevelNorm
from ..layers.norm_act import MABNAct2d
from .callers import RUN_IN_TURN, Callers

# {class of a block: the class without the ReLU behind its convolutions}, whose attribute `with_relu`
# names these. Looked up by the exact type: subclasses have forwards of their own.
FUSED_BLOCKS: dict[type[nn.Module], type[Any]] = {}
# Classes of convolutions that run their `norm` and then their `activation`.
CONVS_WITH_ACTIVATION: set[type[nn.Module]] = set()


class Applied(nn.Module):
    """Stands in the place of `relu`, which the norm in front applies."""

    def __init__(self, relu: nn.Module) -> None:
        super().__init__()
        self.relu = relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x."""
        return x


def fuse_relu(model: nn.Module) -> nn.Module:
    """Give every MABN layer that a ReLU follows that ReLU, in place; return the model.

    What the model computes, its state dict and its parameters stay. Norms that several places
    share are left alone, and so are those in an nn.Sequential if the forward of the module above calls
    its parts one by one, or can't be traced symbolically (torch.fx). Call `unfuse_relu` before you replace a norm: its ReLU would go with it.
    """
    uses: Counter[object] = Counter(
        child for parent in model.modules() for child in parent._modules.values()
    )

    def can_have(norm: object) -> bool:
        layers = _layers(norm)
        free = bool(layers) and all(layer.activation is None for layer in layers)
        return free and uses[norm] == 1

    callers = Callers(model)

    def runs_whole(module: nn.Module) -> bool:
        in_turn = type(module).forward in RUN_IN_TURN
        return not in_turn or all(
            callers.calls_children(caller, module) is False for caller in callers.of(module)
        )

    for module in list(model.modules()):
        if type(module) in FUSED_BLOCKS:
            fused = FUSED_BLOCKS[type(module)]
            convs = [getattr(module, name) for name in fused.with_relu]
            if all(uses[conv] == 1 and can_have(conv.norm) for conv in convs):
                module.__class__ = fused
                for conv in convs:
                    _set_activation(conv.norm, "relu")
        for norm, name, relu in _followed(module):
            if _is_relu(relu) and can_have(norm) and runs_whole(module):
                _set_activation(norm, "relu")
                setattr(module, name, Applied(relu if isinstance(relu, nn.ReLU) else nn.ReLU()))
    return model


def unfuse_relu(model: nn.Module) -> nn.Module:
    """Undo `fuse_relu`, in place; return the model.

    A function in the place of Conv2d's `activation` comes back as nn.ReLU. Layers that were made
    with activation="relu" keep it.
    """
    unfused: dict[type[nn.Module], tuple[type[nn.Module], tuple[str, ...]]] = {
        fused: (block, fused.with_relu) for block, fused in FUSED_BLOCKS.items()
    }
    for module in list(model.modules()):
        if type(module) in unfused:
            block, with_relu = unfused[type(module)]
            for name in with_relu:
                _set_activation(getattr(module, name).norm, None)
            module.__class__ = block
        for norm, name, applied in _followed(module):
            if isinstance(applied, Applied):
                _set_activation(norm, None)
                setattr(module, name, applied.relu)
    return model


def _followed(module: nn.Module) -> Iterator[tuple[object, str, object]]:
    """Yield (child, name of what runs next on its output, what that is) of a module's children."""
    if isinstance(module, MABNAct2d):
        if type(module.drop) is nn.Identity:
            yield module, "act", module.act
    elif isinstance(module, tuple(CONVS_WITH_ACTIVATION)):
        yield module.norm, "activation", module.activation
    elif type(module).forward in RUN_IN_TURN:
        for (_, child), (name, following) in pairwise(list(module._modules.items())):
            yield child, name, following


def _is_relu(function: object) -> bool:
    return type(function) is nn.ReLU or function in (F.relu, F.relu_, torch.relu)


def _layers(norm: object) -> list[MABN2d]:
    """Return the MABN layers of a norm: itself, or one for each level; none for another norm."""
    layers: Iterable[object] = norm if isinstance(norm, PerLevelNorm) else [norm]
    return [layer for layer in layers if isinstance(layer, MABN2d)]


def _set_activation(norm: object, activation: str | None) -> None:
    for layer in _layers(norm):
        layer.activation = activation
