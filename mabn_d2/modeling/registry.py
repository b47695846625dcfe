"""Registration with Detectron2's registries that survives a second import of this package."""

from collections.abc import Callable
from typing import Any

from fvcore.common.registry import Registry


def register(registry: Registry) -> Callable[[Any], Any]:
    """Return a decorator like `registry.register()`, which replaces an object of the same name.

    A notebook that imports the package again (autoreload) would otherwise end in an AssertionError.
    """

    def add(obj: Any) -> Any:
        registry._obj_map.pop(obj.__name__, None)  # a Registry has no method for it
        registry.register(obj)
        return obj

    return add
