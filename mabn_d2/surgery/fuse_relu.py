"""MABN and the ReLU behind it as one layer, in Detectron2's models.

`MABN2d(activation="relu")` takes about half the time of a norm and a ReLU. Detectron2 has the ReLU
in three forms, which are fused in place so that the keys of a state dict, and the plain lists that
models keep of their parts, stay as they are:

- an argument `activation` of its Conv2d (box, mask and semantic segmentation heads, ASPP): an
  `Applied` takes its place;
- a module of its own behind the norm, in what runs its children in turn (RetinaNet, FCOS, RegNet):
  the same;
- a call in the forward of a ResNet's stem or block: the class is exchanged for one without it. The
  last norm of a block is added to the shortcut before the ReLU, and can't have it.
"""

from collections import Counter
from itertools import pairwise

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling.backbone import regnet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import nn

from ..layers import MABN2d, PerLevelNorm


class Applied(nn.Module):
    """Stands in the place of `relu`, which the norm in front applies."""

    def __init__(self, relu):
        super().__init__()
        self.relu = relu

    def forward(self, x):
        return x


# The forwards of Detectron2's classes without the ReLU behind the convolutions `with_relu`, whose
# norms have it.


class FusedBasicStem(BasicStem):
    with_relu = ("conv1",)

    def forward(self, x):
        return F.max_pool2d(self.conv1(x), kernel_size=3, stride=2, padding=1)


class FusedBasicBlock(BasicBlock):
    with_relu = ("conv1",)

    def forward(self, x):
        out = self.conv2(self.conv1(x))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class FusedBottleneckBlock(BottleneckBlock):
    with_relu = ("conv1", "conv2")

    def forward(self, x):
        out = self.conv3(self.conv2(self.conv1(x)))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


# Looked up by the exact type: subclasses have forwards of their own.
_FUSED = {cls.__base__: cls for cls in (FusedBasicStem, FusedBasicBlock, FusedBottleneckBlock)}
_RUN_IN_TURN = {
    cls.forward
    for cls in (
        nn.Sequential,
        regnet.ResStem,
        regnet.SimpleStem,
        regnet.VanillaBlock,
        regnet.BasicTransform,
        regnet.BottleneckTransform,
    )
}


def fuse_relu(model):
    """Give every MABN layer that a ReLU follows that ReLU, in place; return the model.

    What the model computes, its state dict and its parameters stay. Norms that several places
    share are left alone. Call `unfuse_relu` before you replace a norm: its ReLU would go with it.
    """
    uses = Counter(child for parent in model.modules() for child in parent._modules.values())

    def can_have(norm):
        return uses[norm] == 1 and all(
            isinstance(layer, MABN2d) and layer.activation is None for layer in _layers(norm)
        )

    for module in list(model.modules()):
        if type(module) in _FUSED:
            fused = _FUSED[type(module)]
            convs = [getattr(module, name) for name in fused.with_relu]
            if all(uses[conv] == 1 and can_have(conv.norm) for conv in convs):
                module.__class__ = fused
                for conv in convs:
                    _set_activation(conv.norm, "relu")
        for norm, name, relu in _followed(module):
            if _is_relu(relu) and can_have(norm):
                _set_activation(norm, "relu")
                setattr(module, name, Applied(relu if isinstance(relu, nn.ReLU) else nn.ReLU()))
    return model


def unfuse_relu(model):
    """Undo `fuse_relu`, in place; return the model.

    A function in the place of Conv2d's `activation` comes back as nn.ReLU. Layers that were made
    with activation="relu" keep it.
    """
    for module in list(model.modules()):
        if type(module) in _FUSED.values():
            for name in module.with_relu:
                _set_activation(getattr(module, name).norm, None)
            module.__class__ = type(module).__base__
        for norm, name, applied in _followed(module):
            if isinstance(applied, Applied):
                _set_activation(norm, None)
                setattr(module, name, applied.relu)
    return model


def _followed(module):
    """Yield (child, name of what runs next on its output, what that is) of a module's children."""
    if isinstance(module, Conv2d):
        yield module.norm, "activation", module.activation
    elif type(module).forward in _RUN_IN_TURN:
        for (_, child), (name, following) in pairwise(list(module._modules.items())):
            yield child, name, following


def _is_relu(function):
    return type(function) is nn.ReLU or function in (F.relu, F.relu_, torch.relu)


def _layers(norm):
    return norm if isinstance(norm, PerLevelNorm) else [norm]


def _set_activation(norm, activation):
    for layer in _layers(norm):
        layer.activation = activation
