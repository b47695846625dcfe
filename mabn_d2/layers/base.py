"""What the norm layers share: settings, the dtype of statistics, the check of an input's shape."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics beside a weight of `dtype`: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def check_input(num_features: int, x: torch.Tensor) -> None:
    """Raise ValueError if x is not (N, num_features, H, W)."""
    if x.dim() != 4 or x.shape[1] != num_features:
        raise ValueError(f"expected input of shape (N, {num_features}, H, W), got {tuple(x.shape)}")


class ConfigurableNorm(nn.Module):
    """A norm layer over (N, C, H, W) with weight, bias, and settings that may change later.

    A subclass names its settings and statistics; its constructor calls `configure` with all of the
    settings. To assign to a setting (`layer.eps = 1e-3`) is the same as to call `configure`.

    Args:
        num_features: C.
        device, dtype: of weight and bias; statistics are float32 at least.

    Raises:
        ValueError: if num_features is not positive.
    """

    SETTINGS: ClassVar[dict[str, type]] = {}  # name -> float or int
    STATISTICS: ClassVar[tuple[str, ...]] = ()  # buffers that stay float32 under .half()

    def __init__(
        self,
        num_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be positive, got {num_features}")
        self.num_features = num_features
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))

    def _empty_statistics(self, *shape: int) -> torch.Tensor:
        """Return an uninitialized tensor of statistics beside the weight."""
        dtype = statistics_dtype(self.weight.dtype)
        return torch.empty(shape, dtype=dtype, device=self.weight.device)

    def configure(self, **settings: Any) -> None:
        """Set any of the settings of a built layer. Nothing changes if one of them is wrong.

        Args:
            settings: arguments of the constructor.

        Raises:
            TypeError: for an unknown setting.
            ValueError: for a setting out of range.
        """
        unknown = sorted(settings.keys() - self.SETTINGS.keys())
        if unknown:
            raise TypeError(f"{type(self).__name__} has no argument {unknown[0]}")
        given = {
            name: _number(name, value, self.SETTINGS[name]) for name, value in settings.items()
        }
        new = {name: self.__dict__.get(name) for name in self.SETTINGS} | given
        self._check_settings(new)
        self.__dict__.update(new)
        self._apply_settings()

    def _check_settings(self, new: dict[str, Any]) -> None:
        """Raise ValueError if a setting is out of range."""
        raise NotImplementedError

    def _apply_settings(self) -> None:
        """Bring what depends on the settings up to date."""

    def reset_running_stats(self) -> None:
        """Reset all statistics."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Reset weight, bias and all statistics."""
        self.reset_running_stats()
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        shown = (f"{name}={getattr(self, name)}" for name in self.SETTINGS)
        return ", ".join([str(self.num_features), *shown])

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.SETTINGS:
            self.configure(**{name: value})
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = {name: getattr(self, name) for name in self.STATISTICS}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype != statistics_dtype(after.dtype):  # .half(), .bfloat16()
                setattr(self, name, buffer.to(after.device))
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # load_state_dict(assign=True) takes tensors as they are, also those of a file in half precision.
        if local_metadata.get("assign_to_params_buffers"):
            weight = state_dict.get(prefix + "weight", self.weight)
            for name, buffer in self._buffers.items():
                value = state_dict.get(prefix + name)
                if buffer is not None and value is not None:
                    floating = buffer.dtype.is_floating_point
                    dtype = statistics_dtype(weight.dtype) if floating else buffer.dtype
                    state_dict[prefix + name] = value.to(dtype)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)


def check_ranges(settings: dict[str, Any], in_range: dict[str, bool]) -> None:
    """Raise ValueError with the value of the first setting that is not `in_range`."""
    for name, good in in_range.items():
        if not good:
            raise ValueError(f"{name} is out of range: {settings[name]}")


def _number(name: str, value: Any, kind: type) -> float | int:
    """Return a setting as a plain float or int; NumPy's numbers and 0-d tensors become these.

    Raises:
        ValueError: if it is no such number.
    """
    try:
        if kind is float:
            return float(value)
        whole = int(value)
        if whole != value:  # 32.0 is a whole number, too
            raise ValueError
        return whole
    except (OverflowError, TypeError, ValueError) as error:
        wanted = "a number" if kind is float else "a whole number"
        raise ValueError(f"{name} must be {wanted}, got {value!r}") from error
