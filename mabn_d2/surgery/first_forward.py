"""A check that the first training forward makes: a norm's input is its convolution's output.

Afterwards the hooks remove themselves. While torch.compile traces a forward the check is made on the
traced tensors, by identity; nothing of it is left in the compiled code.
"""

import torch
from torch import nn

from .pairs import same_values, version_of


class _Check:
    """What the hooks of one norm and its convolutions share."""

    def __init__(self, norm: str, convs: list[str]) -> None:
        self.norm, self.convs = norm, convs
        self.outputs: list[tuple[int, torch.Tensor, int]] = []
        self.missing = set(range(len(convs)))

    def passes(self, x: torch.Tensor) -> int | None:
        """Return the number of the convolution whose output x is; None if there is none."""
        for number, output, version in self.outputs:
            if torch.compiler.is_compiling():
                if x is output:
                    return number
            elif same_values(x, output, version):
                return number
        return None


class _KeepOutput:
    """Forward hook of a convolution."""

    def __init__(self, check: _Check, number: int) -> None:
        self.check, self.number = check, number

    def __call__(self, conv: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if not self.check.missing:
            _remove(conv._forward_hooks, self)
        elif conv.training:
            version = 0 if torch.compiler.is_compiling() else version_of(output)
            self.check.outputs.append((self.number, output, version))


class _CompareInput:
    """Forward pre-hook of a norm."""

    def __init__(self, check: _Check) -> None:
        self.check = check

    def __call__(self, norm: nn.Module, args: tuple) -> None:
        check = self.check
        if not norm.training:
            check.outputs.clear()
            return
        if not check.missing:
            return  # another thread has just removed this hook
        number = check.passes(args[0])
        if number is None:
            raise ValueError(
                f"the input of {check.norm} is not the output of {', '.join(check.convs)}, which was "
                "registered in front of it: let MABN follow a convolution, convert the model with "
                "example_inputs, which show the convolution to be centred, or use another norm there"
            )
        if torch.compiler.is_compiling():
            check.outputs.clear()
            return
        check.outputs = [kept for kept in check.outputs if kept[0] != number]
        check.missing.discard(number)
        if not check.missing:
            check.outputs = []
            _remove(norm._forward_pre_hooks, self)


def _remove(hooks: dict, hook: object) -> None:
    for key in [key for key, value in hooks.items() if value is hook]:
        del hooks[key]


def remove_check(module: nn.Module) -> None:
    """Remove the hooks of a check from a norm or a convolution."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for hook in list(hooks.values()):
            if isinstance(hook, (_KeepOutput, _CompareInput)):
                _remove(hooks, hook)


def check_in_first_forward(
    norm: nn.Module, convs: tuple[nn.Module, ...], names: dict[nn.Module, str]
) -> None:
    """Let the first training forward raise ValueError if a norm's input is no output of `convs`.

    Args:
        names: of the modules, for the message.
    """
    check = _Check(names[norm], [names[conv] for conv in convs])
    for number, conv in enumerate(convs):
        conv.register_forward_hook(_KeepOutput(check, number))
    norm.register_forward_pre_hook(_CompareInput(check))
