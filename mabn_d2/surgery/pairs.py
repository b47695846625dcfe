"""Which convolution stands in front of a norm, and whether anything else uses its output.

The order in which a module registers its parts need not be the order in which it runs them. So a pair
is taken from what the model does, as far as this can be found out:

1. A convolution that holds the norm (Detectron2's Conv2d) leaves no doubt.
2. With example inputs a forward shows which output each norm gets, and who else gets it.
3. A module that runs its children in turn (nn.Sequential) has the convolution in front.
4. Otherwise the forward of the module that holds the norm is traced symbolically (torch.fx).
5. If that is not possible, the module registered just before the norm is taken. Whoever takes it has
   to check it (`first_forward`).
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..layers import CenConv2d, CenConvTranspose2d
from .callers import RUN_IN_TURN, Callers
from .convolutions import Convolution, is_convolution

# Convolutions that don't run a norm which somebody attaches to them.
_WITHOUT_NORM = (nn.Conv2d, nn.ConvTranspose2d, CenConv2d, CenConvTranspose2d)


class Pair(NamedTuple):
    """The convolutions whose outputs a norm gets.

    Attributes:
        convs: more than one if the norm is shared.
        certain: whether the structure of the model, or a forward, leaves no doubt.
        exclusive: whether nothing else uses the outputs; None if this is not known.
    """

    convs: tuple[Convolution, ...]
    certain: bool
    exclusive: bool | None


class Place(NamedTuple):
    """One place of a module: `path` is `name` in `parent`, both from the root of the model."""

    path: str
    parent: nn.Module
    name: str
    module: nn.Module


def places_of(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[Place]:
    """Yield every place of `modules` in `model`, also the second one of a module that is shared."""
    wanted = set(modules)
    for prefix, parent in model.named_modules():
        for name, child in parent._modules.items():  # which, unlike named_children, repeats
            if child in wanted:
                yield Place(f"{prefix}.{name}".lstrip("."), parent, name, child)


def find_pairs(
    model: nn.Module, norms: Iterable[nn.Module], example_inputs: Any = None
) -> dict[nn.Module, Pair | str]:
    """Return the Pair of each norm, or the reason why it has none.

    Args:
        example_inputs: arguments of the model, a tuple, or its only argument. The forward runs in
            evaluation mode, without gradients.
    """
    norms = list(norms)
    names = {module: name for name, module in model.named_modules()}
    uses = Counter(c for m in model.modules() for c in m._modules.values() if c is not None)
    by_data = {} if example_inputs is None else _by_data(model, norms, example_inputs, names)
    callers = Callers(model)
    found: dict[nn.Module, Pair | str] = {}
    for place in places_of(model, norms):
        norm = place.module
        pair: Pair | str | None = _held_by_convolution(place, uses)
        if pair is None and norm in by_data:
            pair = by_data[norm]
        if pair is None and type(place.parent).forward in RUN_IN_TURN:
            # Unless the module above takes the parts one by one.
            above = [c for c in callers.of(place.parent) if callers.calls_children(c, place.parent)]
            pair = _by_trace(place, above[0], callers, names) if above else _in_turn(place, uses)
        if pair is None:
            pair = _by_trace(place, callers.owners[place.parent], callers, names)
        if pair is None:
            pair = _by_registration(place)
        if isinstance(pair, str) and isinstance(registered := _by_registration(place), Pair):
            pair += f"; it is registered behind {names[registered.convs[0]]}"
        found[norm] = _merged(found[norm], pair) if norm in found else pair
    for norm in norms:
        found.setdefault(norm, f"nothing stands in front of it in {type(model).__name__}")
    return found


def _merged(first: Pair | str, second: Pair | str) -> Pair | str:
    if isinstance(first, str) or isinstance(second, str):
        return first if isinstance(first, str) else second
    convs = dict.fromkeys(first.convs + second.convs)
    exclusive = (
        None
        if None in (first.exclusive, second.exclusive)
        else (bool(first.exclusive and second.exclusive))
    )
    return Pair(tuple(convs), first.certain and second.certain, exclusive)


def _held_by_convolution(place: Place, uses: Counter) -> Pair | None:
    if not is_convolution(place.parent):
        return None
    if place.name != "norm" or type(place.parent) in _WITHOUT_NORM:
        return None  # its forward does not run the norm
    return Pair((place.parent,), True, uses[place.module] == 1)


def _in_turn(place: Place, uses: Counter) -> Pair | str | None:
    parent, before = place.parent, None
    for name, child in parent._modules.items():
        if name == place.name:
            break
        before = child if child is not None and type(child) is not nn.Identity else before
    if before is None:
        return None  # what runs before the parent does not show here
    before = _last(before)
    if not is_convolution(before):
        return None if any(is_convolution(m) for m in before.modules()) else _wrong(before)
    return Pair((before,), False, uses[before] == 1 and uses[place.module] == 1)


def _last(module: nn.Module) -> nn.Module:
    """Return the module whose output a module returns that runs its children in turn."""
    while type(module).forward in RUN_IN_TURN:
        children = [c for c in module.children() if type(c) is not nn.Identity]
        if not children:
            break
        module = children[-1]
    return module


def _wrong(before: nn.Module) -> str:
    cls = type(before)
    return (
        f"its input is the output of {cls.__module__}.{cls.__qualname__}, which can't be a "
        "zero-centred convolution"
    )


def _by_trace(
    place: Place,
    owner: nn.Module,
    callers: Callers,
    names: dict[nn.Module, str],
) -> Pair | str | None:
    graph = callers.graph(owner)
    if graph is None:
        return None

    def called(node: Any) -> nn.Module | None:
        is_call = isinstance(node, fx.Node) and node.op == "call_module"
        return _last(owner.get_submodule(str(node.target))) if is_call else None

    calls = [node for node in graph.nodes if called(node) is place.module]
    if not calls:
        return None
    convs: dict[Convolution, None] = {}
    for call in calls:
        source: Any = call.args[0] if call.args else next(iter(call.kwargs.values()), None)
        while type(called(source)) is nn.Identity:
            source = source.args[0]
        module = called(source)
        if module is None:
            if isinstance(source, fx.Node) and source.op == "placeholder":
                return None  # an argument of the forward: the owner's caller knows
            what = f"{source.op} {source.name}" if isinstance(source, fx.Node) else repr(source)
            return (
                f"its input is not the output of a convolution but of {what} in "
                f"{type(owner).__name__}.forward"
            )
        if not is_convolution(module):
            if any(is_convolution(m) for m in module.modules()):
                return None  # the convolution may be the last thing in there
            return f"{_wrong(module)} ({names[module]})"
        convs[module] = None
    outputs = [node for node in graph.nodes if called(node) in convs]
    for node in (user for output in outputs for user in output.users):
        name = getattr(node.target, "__name__", str(node.target))
        if node.op in ("call_function", "call_method") and name[-1] == "_" != name[-2]:
            return f"its input is the output of a convolution that {name} changes in place"
    exclusive = all(set(node.users) <= set(calls) for node in outputs)
    return Pair(tuple(convs), False, exclusive)


def _by_registration(place: Place) -> Pair | str:
    if is_convolution(place.parent):
        return Pair((place.parent,), False, None)
    before = None
    for name, child in place.parent._modules.items():
        if name == place.name:
            break
        before = child if child is not None else before
    if before is None:
        return f"nothing stands in front of it in {type(place.parent).__name__}"
    before = _last(before)
    if not is_convolution(before):
        return f"{_wrong(before)}, or give example_inputs to show what is in front of it"
    return Pair((before,), False, None)


class _Output:
    """One output of a convolution in the recorded forward."""

    def __init__(self, conv: Convolution, tensor: torch.Tensor) -> None:
        self.conv, self.tensor, self.version = conv, tensor, version_of(tensor)
        self.norms: set[nn.Module] = set()
        self.other = False

    def reaches(self, x: torch.Tensor) -> bool:
        return same_values(x, self.tensor, self.version)


def version_of(tensor: torch.Tensor) -> int:
    """Return the number of changes in place, which inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def same_values(x: torch.Tensor, output: torch.Tensor, version: int) -> bool:
    """Return True if x has the values that `output` had at `version`, in any dtype and layout."""
    if version_of(output) != version or x.shape != output.shape or x.device != output.device:
        return False
    return x is output or x.is_set_to(output) or torch.equal(x, output.to(x.dtype))


class _Users(TorchDispatchMode):
    """Marks the recorded outputs that operators outside of the norms get."""

    def __init__(self, outputs: dict[int, _Output]) -> None:
        super().__init__()
        self.outputs, self.depth = outputs, 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.depth == 0:
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self.outputs:
                    self.outputs[id(leaf)].other = True
        return func(*args, **kwargs)


@torch.no_grad()
def _by_data(
    model: nn.Module, norms: list[nn.Module], example_inputs: Any, names: dict[nn.Module, str]
) -> dict[nn.Module, Pair | str]:
    """Run the model; return the Pair, or the problem, of each norm that is called."""
    outputs: dict[int, _Output] = {}  # by id; the tensors are kept, so that ids stay unique
    inputs: dict[nn.Module, list[_Output | None]] = {}
    users = _Users(outputs)

    def after_conv(conv: Convolution, args: tuple[Any, ...], output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                outputs[id(tensor)] = _Output(conv, tensor)

    def before_norm(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        users.depth += 1  # comparisons and the norm itself are no other users
        source = outputs.get(id(x))
        if source is None or not source.reaches(x):
            source = next((o for o in reversed(outputs.values()) if o.reaches(x)), None)
        if source is not None:
            source.norms.add(norm)
        inputs.setdefault(norm, []).append(source)

    def after_norm(norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        users.depth -= 1

    handles = []
    convs = [
        module
        for module in names
        if is_convolution(module)
        and (type(module) in _WITHOUT_NORM or getattr(module, "norm", None) is None)
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        handles += [conv.register_forward_hook(after_conv) for conv in convs]
        for norm in norms:
            handles.append(norm.register_forward_pre_hook(before_norm, with_kwargs=True))
            handles.append(norm.register_forward_hook(after_norm))
        model.eval()
        with _without_zeros(model), users:
            result = run(model, _with_noise(example_inputs))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    for leaf in tree_leaves(result):
        if id(leaf) in outputs:
            outputs[id(leaf)].other = True
    found: dict[nn.Module, Pair | str] = {}
    for norm, sources in inputs.items():
        fed = [source for source in sources if source is not None]
        if len(fed) < len(sources):
            found[norm] = "its input is not the output of a convolution"
            continue
        fed_by = tuple(dict.fromkeys(source.conv for source in fed))
        exclusive = all(
            output.norms == {norm} and not output.other
            for output in outputs.values()
            if output.conv in fed_by
        )
        found[norm] = Pair(fed_by, True, exclusive)
    return found


@contextmanager
def _without_zeros(model: nn.Module) -> Iterator[None]:
    """Fill parameters that are all zero: a branch that they switch off would not show in the values."""
    generator = torch.Generator().manual_seed(0)
    zeros = [p.data for p in model.parameters() if p.is_floating_point() and not p.data.any()]
    try:
        for parameter in zeros:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        yield
    finally:
        for parameter in zeros:
            parameter.zero_()


def _with_noise(example_inputs: Any) -> Any:
    """Return inputs in which no floating-point tensor is constant, as torch.zeros is.

    The noise is positive and small, so that what is an image stays one.
    """
    generator = torch.Generator().manual_seed(0)

    def add(leaf: Any) -> Any:
        if not (isinstance(leaf, torch.Tensor) and leaf.is_floating_point()):
            return leaf
        noise = 0.01 * torch.rand(leaf.shape, generator=generator)
        return leaf + noise.to(leaf.device, leaf.dtype)

    return tree_map(add, example_inputs)


def run(model: nn.Module, example_inputs: Any) -> Any:
    """Call the model with example inputs: a tuple of arguments, or the only argument."""
    return model(*example_inputs) if isinstance(example_inputs, tuple) else model(example_inputs)
