"""running_var from data, at fixed weights: fvcore's `update_bn_stats`, for MABN."""

import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..layers import MABN2d
from ..layers.functional_split import mean_square
from ..layers.ops.dispatch import select_backend
from ..layers.ops.memory_format import dense

_logger = logging.getLogger(__name__)


class _Reached(Exception):
    """Ends a forward behind the last layer that is of interest."""


def layers_to_recalibrate(model: nn.Module) -> dict[MABN2d, str]:
    """Return {MABN layer: name} of those that are not frozen, whose weight requires grad."""
    return {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, MABN2d) and module.weight.requires_grad
    }


@torch.no_grad()
def update_mabn_stats(model: nn.Module, data_loader: Iterable[Any], num_iters: int = 200) -> None:
    r"""Set running_var of every MABN layer to the second moment of what reaches it.

    In training running_var averages over the last iterations, whose weights differed. Here, with
    fixed weights and over all batches,

    .. math:: R = E[x^2] = \sum_{batches} \sum_{n,h,w} x_{nchw}^2 \Big/ \sum_{batches} N H W

    (section 3 of "Rethinking Batch in BatchNorm", https://arxiv.org/abs/2105.07576, argues for the
    same in BatchNorm.) MABN layers normalize by running_var meanwhile, as in evaluation, and are
    set one after the other, in the order in which the model uses them: what reaches a layer was
    normalized by the new values of all before it. So the result depends neither on the values of
    before nor on how the same images are cut into batches, or spread over ranks (up to rounding).

    Note that

    1. each layer takes forwards over all batches up to itself: half a forward for each layer and
       batch, where BatchNorm's counterpart takes one for each batch. Few batches do, since each
       has thousands of pixels, fewer in the RoI heads. Numbers and texts that a forward assigns to
       modules (a counter of calls) are set back where it ends early;
    2. the batches stay in memory, on the data loader's side, until the end;
    3. the model's mode is left as it is, but for MABN's. Detectron2's detectors sample RoIs at
       random in training mode; their heads then get values that vary by the draw.

    Args:
        model: called with each batch, or with the input in it. MABN layers whose weight does not
            require grad are frozen, and left alone; so are those that no batch reaches, with a warning.
        data_loader: an iterable of batches. Of a batch (input, target) the model gets the input,
            unless it takes a list of tensors.
        num_iters: the number of batches to take.
    Raises:
        ValueError: if there are fewer batches, on any rank, or no layer to set.
        FloatingPointError: naming a layer that something reaches that is not finite; nothing has
            changed then.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile, where `_run_eagerly` can't do it
    if isinstance(model, DistributedDataParallel):
        model = model.module  # a forward that ends early must not be waited for
    layers = layers_to_recalibrate(model)
    if not layers:
        raise ValueError(
            "the model has no MABN layer to recalibrate: the weight of a frozen one has to require "
            "grad"
        )
    batches = list(islice(data_loader, num_iters))
    # The least of all ranks, which have to go on or to stop together.
    (least,) = _reduced(torch.tensor([len(batches)]), layers, "MIN").tolist()
    if least < max(num_iters, 1):
        raise ValueError(
            f"{num_iters} batches are to be read, at least 1, but the data loader has {least}: change "
            "num_iters (TEST.PRECISE_BN.NUM_ITER)"
        )
    before = {layer: layer.running_var.clone() for layer in layers}
    try:
        with _as_in_evaluation(layers), _run_eagerly():
            batches = _inputs(model, batches)
            calls = [_calls(model, layers, batch) for batch in batches]
            for index, layer in enumerate(_order(layers, calls), start=1):
                x2 = _second_moment(model, layer, batches, [c.get(layer) for c in calls])
                if x2 is None:
                    _logger.warning(f"no batch reaches {layers[layer]}: its running_var is left")
                elif not x2.isfinite().all():
                    raise FloatingPointError(
                        f"what reaches {layers[layer]} is not finite: running_var is left "
                        "everywhere"
                    )
                else:
                    layer.running_var.copy_(x2)
                if index % 10 == 0 or index == len(layers):
                    _logger.info(f"recalibrated {index} of {len(layers)} MABN layers")
    except BaseException:
        for layer, running_var in before.items():
            layer.running_var.copy_(running_var)
        raise


def _run_eagerly() -> AbstractContextManager[object]:
    """Return a context in which compiled models call the hooks that came after their compilation.

    Torch before 2.6 has none; nothing changes then.
    """
    if hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


@contextmanager
def _as_in_evaluation(layers: Collection[nn.Module]) -> Iterator[None]:
    modes = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = False
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode


def _inputs(model: nn.Module, batches: list[Any]) -> list[Any]:
    """Return what the model takes of each batch: the first element if it does not take the whole.

    `torch.optim.swa_utils.update_bn` takes the first element of every list. Here a list may be the
    levels of a pyramid, too.
    """
    first = batches[0]
    if isinstance(first, (list, tuple)) and first and isinstance(first[0], torch.Tensor):
        try:
            model(first)
        except (AttributeError, TypeError):  # what a list raises in place of a tensor
            return [batch[0] for batch in batches]
    return batches


def _calls(model: nn.Module, layers: Iterable[MABN2d], batch: Any) -> dict[MABN2d, int]:
    """Return {layer: number of its calls} in one forward, in the order of the first ones."""
    calls: dict[MABN2d, int] = {}

    def count(layer: MABN2d, args: tuple[Any, ...]) -> None:
        calls[layer] = calls.get(layer, 0) + 1

    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _order(layers: Iterable[MABN2d], calls: Iterable[dict[MABN2d, int]]) -> list[MABN2d]:
    """Return the layers in the order of their first use, the same on all ranks."""
    layers = list(layers)
    first = torch.full((len(layers),), len(layers))
    position = {layer: i for i, layer in enumerate(layers)}
    for used in calls:
        for turn, layer in enumerate(used):
            first[position[layer]] = min(turn, int(first[position[layer]]))
    turns = _reduced(first, layers, "MIN").tolist()
    return sorted(layers, key=lambda layer: (turns[position[layer]], position[layer]))


def _reduced(values: torch.Tensor, layers: Iterable[MABN2d], operation: str) -> torch.Tensor:
    """Return `values` reduced over all ranks, by way of the device of the layers."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    values = values.to(next(iter(layers)).running_var.device)
    dist.all_reduce(values, getattr(dist.ReduceOp, operation))
    return values


@contextmanager
def _set_back(model: nn.Module) -> Iterator[None]:
    """Set numbers and texts that a forward assigns to modules back if it ends early."""
    kinds = (bool, int, float, str, type(None))
    before = {
        module: {name: value for name, value in vars(module).items() if isinstance(value, kinds)}
        for module in model.modules()
    }
    try:
        yield
    except _Reached:
        for module, attributes in before.items():
            vars(module).update(attributes)


def _second_moment(
    model: nn.Module, layer: MABN2d, batches: Iterable[Any], calls: Iterable[int | None]
) -> torch.Tensor | None:
    """Return E[x^2] (C,) over all inputs of `layer`, on all ranks; None if there are none.

    Args:
        calls: how often the forward of each batch uses the layer, after which it may end; None if
            it did not.
    """
    total = layer.running_var.new_zeros(layer.num_features + 1, dtype=torch.float64)
    seen: int = 0
    last: int | None = None

    def add(layer: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal seen
        x = args[0]
        if x.numel():
            x = dense(x.detach())
            count = x.numel() // x.shape[1]
            total[:-1] += mean_square(select_backend(x), x).double() * count
            total[-1] += count
        seen += 1
        if seen == last:
            raise _Reached

    hook = layer.register_forward_pre_hook(add)
    try:
        for batch, uses in zip(batches, calls, strict=True):
            seen, last = 0, uses
            with _set_back(model):
                model(batch)
    finally:
        hook.remove()
    total = _reduced(total, [layer], "SUM")
    return total[:-1] / total[-1] if total[-1] > 0 else None
