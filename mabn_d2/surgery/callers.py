"""Who calls a module that runs its children in turn, and whether as a whole or child by child."""

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import fx, nn

# Forwards that run the module's children in turn.
RUN_IN_TURN: set[Callable[..., Any]] = {nn.Sequential.forward}
# Forwards, by module and name, that can't be traced, and are known to call such modules as a whole.
CALL_WHOLE = {
    "torchvision.models.detection.fcos.FCOSClassificationHead.forward",
    "torchvision.models.detection.fcos.FCOSRegressionHead.forward",
    "torchvision.models.detection.retinanet.RetinaNetClassificationHead.forward",
    "torchvision.models.detection.retinanet.RetinaNetRegressionHead.forward",
    "torchvision.models.detection.roi_heads.RoIHeads.forward",
    "torchvision.models.detection.rpn.RPNHead.forward",
    "torchvision.ops.feature_pyramid_network.FeaturePyramidNetwork.forward",
    "detectron2.modeling.backbone.regnet.AnyNet.forward",
    "detectron2.modeling.meta_arch.fcos.FCOSHead.forward",
    "detectron2.modeling.meta_arch.retinanet.RetinaNetHead.forward",
}


class _Tracer(fx.Tracer):
    """Runs one forward symbolically; the modules that it calls are opaque."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class Callers:
    """The modules of a model that call others; their forwards are traced when asked for.

    Attributes:
        owners: {module: itself, or the nearest module above it that has a forward}.
    """

    def __init__(self, model: nn.Module) -> None:
        self.owners = {model: model}
        self._parents: dict[nn.Module, list[nn.Module]] = defaultdict(list)
        self._graphs: dict[nn.Module, fx.Graph | None] = {}
        for module in model.modules():
            for child in module._modules.values():
                if child is None:
                    continue
                self._parents[child].append(module)
                if child not in self.owners:
                    self.owners[child] = child if _runs(child) else self.owners[module]

    def of(self, module: nn.Module) -> list[nn.Module]:
        """Return the modules that may call `module` or, one by one, its children.

        These are the nearest ones above it that do more than to run their own children in turn.
        """
        found, above = [], list(self._parents[module])
        while above:
            owner = self.owners[above.pop()]
            if type(owner).forward in RUN_IN_TURN:
                above += self._parents[owner]
            elif _runs(owner):
                found.append(owner)
        return found

    def graph(self, owner: nn.Module) -> fx.Graph | None:
        """Return the graph of a module's forward; None if it can't be traced."""
        if owner not in self._graphs:
            self._graphs[owner] = _trace(owner)
        return self._graphs[owner]

    def calls_children(self, owner: nn.Module, module: nn.Module) -> bool | None:
        """Return whether `owner` calls children of `module` one by one; None if it is not known."""
        forward = type(owner).forward
        if f"{forward.__module__}.{forward.__qualname__}" in CALL_WHOLE:
            return False
        graph = self.graph(owner)
        if graph is None:
            return None
        targets = [str(node.target) for node in graph.nodes if node.op == "call_module"]
        children = set(module.children())
        return any(owner.get_submodule(target) in children for target in targets)


def _runs(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _trace(owner: nn.Module) -> fx.Graph | None:
    shell = copy.copy(owner)  # takes what the forward assigns
    # Not by assignment, which a module of torch.compile passes on to the module that it wraps.
    vars(shell)["_modules"] = dict(owner._modules)
    try:
        graph = _Tracer().trace(shell)
    except Exception:  # whatever a forward raises that gets no tensors
        return None
    return graph
