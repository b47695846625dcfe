"""Which BatchNorms can become MABN, and the layer that each of them becomes."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import MABN2d, MABNAct2d, PerLevelNorm, SplitBatchNorm2d, SplitMABNAct2d

# Norms that are BatchNorm of 2d features and nothing else, by their exact class or forward.
PLAIN_BATCH_NORMS: set[type[nn.Module]] = {nn.BatchNorm2d, nn.SyncBatchNorm, SplitBatchNorm2d}
# Lists of BatchNorms, one for each feature level, that share `weight` and `bias`.
BATCH_NORM_LISTS: set[type[nn.ModuleList]] = set()

_PARAMETERS = {"weight", "bias"}
_BUFFERS = {"running_mean", "running_var", "num_batches_tracked"}
_ACT = {"drop", "act"}


def is_batch_norm(module: nn.Module) -> bool:
    """Return True for a BatchNorm of any kind, or a list of them."""
    return isinstance(module, (_BatchNorm, *BATCH_NORM_LISTS))


def mabn_like(norm: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """Return MABN with the parameters and statistics of `norm`, and what `norm` does behind it.

    Args:
        norm: a BatchNorm of 2d features; one with the children `drop` and `act` (timm's
            BatchNormAct2d); or a list of BatchNorms, one for each level.
        settings: of `MABN2d.configure`.

    Raises:
        ValueError: for any other norm, because MABN would lose what it does.
    """
    lists = tuple(BATCH_NORM_LISTS)
    levels = list(norm) if isinstance(norm, lists) else [norm]
    act = _check_kind(norm, levels)
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    if weight is None or bias is None:
        raise ValueError("it has no weight or no bias (affine=False), which MABN always has")
    eps: float = vars(levels[0])["eps"]
    settings = {"eps": eps} | settings
    split = bool(settings.pop("split_batch", False))
    like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    new: nn.Module
    if act:
        cls = SplitMABNAct2d if split else MABNAct2d
        drop, activation = norm.get_submodule("drop"), norm.get_submodule("act")
        new = cls(weight.numel(), drop, activation, **settings, **like)
        # Its class and arguments, for fold_mabn(into="batch_norm"); hidden from torch.
        shell = copy.copy(norm)
        shell._parameters, shell._buffers, shell._modules = {}, {}, {}
        new.__dict__["stock"] = shell
    else:
        new = MABN2d(weight.numel(), split_batch=split, **settings, **like)
    # The same parameters: an optimizer may hold them already.
    new.weight, new.bias = weight, bias
    if levels != [norm]:
        new = PerLevelNorm(new, len(levels))
    layers = [module for module in new.modules() if isinstance(module, MABN2d)]
    for layer, old in zip(layers, levels, strict=True):
        layer.stock_eps = eps
        if isinstance(old.running_var, torch.Tensor):
            layer.running_var.copy_(old.running_var)
    return new.train(norm.training)


def _check_kind(norm: nn.Module, levels: list[nn.Module]) -> bool:
    """Return whether the norm has an activation; raise ValueError if MABN would lose anything."""
    cls = type(norm)
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(f"{cls.__name__} has not seen an input yet: run the model once first")
    if not isinstance(levels[0], (nn.BatchNorm2d, nn.SyncBatchNorm)):
        raise ValueError(f"MABN is for 2d features, which {cls.__name__} is not")
    if levels != [norm]:
        return False
    own = [name for name in norm._parameters if name not in _PARAMETERS]
    own += [name for name in norm._buffers if name not in _BUFFERS]
    own += [name for name in norm._modules if name not in _ACT]
    if own or nn.utils.parametrize.is_parametrized(norm):
        raise ValueError(
            f"{cls.__module__}.{cls.__qualname__} has {', '.join(own) or 'parametrizations'}, which "
            "MABN would lose: replace it by nn.BatchNorm2d and separate modules first"
        )
    plain = {kind.forward for kind in PLAIN_BATCH_NORMS}
    if cls.forward in plain and not norm._modules:
        return False
    if set(norm._modules) == _ACT and _is_norm_drop_act(levels[0]):
        return True
    raise ValueError(
        f"{cls.__module__}.{cls.__qualname__} has a forward of its own, which MABN would lose: "
        "replace it by nn.BatchNorm2d and separate modules first"
    )


@torch.no_grad()
def _is_norm_drop_act(norm: _BatchNorm) -> bool:
    """Return True if a copy of `norm` computes act(drop(BatchNorm)), in evaluation."""
    probe = copy.deepcopy(norm)
    if norm.weight is None:
        return True  # refused for another reason
    if norm.weight.is_meta:
        probe = probe.to_empty(device="cpu")
        probe.reset_parameters()
    probe = probe.float().cpu().eval()
    if probe.running_mean is not None and probe.running_var is not None:
        probe.running_mean.uniform_(-1, 1)
        probe.running_var.uniform_(0.5, 2)
    probe.weight.uniform_(0.5, 2)
    x = torch.linspace(-4, 4, probe.num_features * 18).reshape(2, probe.num_features, 3, 3)
    statistics = (probe.running_mean, probe.running_var)
    y = F.batch_norm(
        x, *statistics, probe.weight, probe.bias, statistics[0] is None, 0.0, probe.eps
    )
    return torch.equal(probe(x), probe.get_submodule("act")(probe.get_submodule("drop")(y)))
