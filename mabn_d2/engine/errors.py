"""Errors that a user can mend are one line and exit status 1, in every tool and every process."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint import CheckpointError
from ..data.coco_check import BadAnnotationError
from ..data.mapper import BadImageError


class ConfigError(ValueError):
    """One line that names the key, its value and what to do."""


ONE_LINE = (ConfigError, BadAnnotationError, BadImageError, CheckpointError)


@contextmanager
def one_line_errors():
    """Exit with the program's name and the message; with MABN_D2_TRACEBACK=1, raise as usual."""
    try:
        yield
    except ONE_LINE as error:
        if os.environ.get("MABN_D2_TRACEBACK", "0") != "0":
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
