"""Reading of JSON files of gigabytes."""

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager

from .errors import BadAnnotationError


@contextmanager
def paused_gc() -> Iterator[None]:
    """Pause the garbage collector, which looks at all objects again and again while they are made.

    At COCO's size it takes as long as the parsing itself.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def local_path(path: str) -> str:
    """Return the file itself, or what Detectron2 downloads for `https://...` and the like."""
    # Not always by the path manager, which may know a corrected copy of the file.
    return path if os.path.isfile(path) else PathManager.get_local_path(path)


def is_text(value: Any) -> bool:
    """Return whether a value is text that can be written; half an emoji, "\\ud83d", can't."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_file(path: Path) -> Any:
    """Return what a JSON file in UTF-8, UTF-16 or UTF-32 holds, also behind a byte order mark.

    Raises:
        OSError, ValueError, RecursionError: if it can't be read.
    """
    with paused_gc():
        return json.loads(path.read_bytes())


def read_json(path: str) -> Any:
    """Return what a JSON file holds.

    Raises:
        BadAnnotationError: if it can't be read.
    """
    try:
        with open(local_path(path), encoding="utf-8") as file, paused_gc():
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise BadAnnotationError(f"{path} can't be read as JSON ({error}): get it anew") from error
