"""Dotted keys of nested configs, such as "SOLVER.MAX_ITER"."""

from collections.abc import Iterator, Mapping
from typing import Any


def get_key(config: Any, key: str) -> Any:
    """Return the value of a key; None if the config does not have it, as versions differ in their keys.

    Args:
        config: nested mappings, such as a CfgNode or a LazyConfig.
        key: names with dots between them.
    """
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys of all values in a nested mapping."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def differences(old: Mapping, new: Mapping, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, old value, new value) of the keys that two nested configs have with other values.

    A key that only one of them has is left out: versions of Detectron2 differ in their keys.
    """
    for name in sorted(old.keys() & new.keys()):
        was, now = old[name], new[name]
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from differences(was, now, f"{prefix}{name}.")
        elif was != now:
            yield f"{prefix}{name}", was, now
