"""Detectron2's evaluators on numpy 2."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from detectron2.evaluation import SemSegEvaluator
from detectron2.utils.file_io import PathManager
from PIL import Image


def _in1d(elements: Any, test_elements: Any, **options: Any) -> np.ndarray:
    return np.isin(np.ravel(elements), test_elements, **options)


DROPPED = {"float": float, "in1d": _in1d}


@contextmanager
def evaluators_on_numpy_2() -> Iterator[None]:
    """Let evaluators be built and used that were written for numpy 1.

    The last versions of `lvis` and `cityscapesscripts` use names that numpy has dropped.
    SemSegEvaluator reads pictures by np.array(..., copy=False), which numpy 2 refuses.
    """
    defaults = SemSegEvaluator.__init__.__kwdefaults__
    original = defaults["sem_seg_loading_fn"]
    added = DROPPED.keys() - vars(np).keys()
    for name in added:
        setattr(np, name, DROPPED[name])
    defaults["sem_seg_loading_fn"] = _read_labels
    try:
        yield
    finally:
        defaults["sem_seg_loading_fn"] = original
        for name in added:
            delattr(np, name)


def _read_labels(filename: str, dtype: Any = None) -> np.ndarray:
    """Return a picture of labels, (H, W); the caller may change it."""
    with PathManager.open(filename, "rb") as file:
        return np.array(Image.open(file), dtype=dtype)
