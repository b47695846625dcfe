"""Exchange of a module's kind while the module object stays."""

from torch import nn

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs")))


def become(module: nn.Module, new: nn.Module) -> None:
    """Turn `module` into what `new` is, in place; `new` must not be used afterwards.

    Every reference to the module stays valid: other names of it, and the plain lists that models
    keep of their parts. Hooks that were registered on the module stay with it.
    """
    hooks = {name: vars(module)[name] for name in _HOOKS}
    module.__class__ = type(new)
    vars(module).clear()
    vars(module).update(vars(new))
    for name, registered in hooks.items():
        vars(module)[name] = type(registered)(registered | vars(new)[name])
