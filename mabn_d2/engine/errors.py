"""Errors that a user can correct are one line and exit status 1, in every tool and every process."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.utils import comm

from ..checkpoint import CheckpointError
from ..command_names import name_commands
from ..data.errors import DataError, one_line
from ..data.mapper import BadImageError
from ..export import ExportError


class ConfigError(ValueError):
    """One line that names the key, its value and what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class DivergedError(FloatingPointError):
    """Gradients that stay not finite: one line that says what to change."""


ONE_LINE: tuple[type[Exception], ...] = (
    ConfigError,
    DataError,
    BadImageError,
    CheckpointError,
    DivergedError,
    ExportError,
)


# What writing to a full disk, above a quota or above the largest size of a file raises.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def shows_traceback() -> bool:
    """Return whether the user has asked for tracebacks."""
    return os.environ.get("MABN_D2_TRACEBACK", "0") != "0"


@contextmanager
def one_line_errors(*others: type[Exception]) -> Iterator[None]:
    """Exit with the program's name and the message; with MABN_D2_TRACEBACK=1, raise as usual.

    A full disk is such an error, whatever is written.

    Args:
        others: further exceptions that are a user's to correct.
    """
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in DISK_FULL
        if shows_traceback() or not (full or isinstance(error, (*ONE_LINE, *others))):
            raise
        if getattr(error, "said_elsewhere", False):  # by another process of this run
            sys.exit(1)
        message = f"can't write: {error}: free space; a training goes on with --resume"
        sys.exit(f"{Path(sys.argv[0]).name}: {message if full else name_commands(str(error))}")


def on_one_rank(function: Callable[[], Any]) -> None:
    """Call `function` in the first process of each machine, while the others wait.

    Raises:
        Exception: where `function` raised it first.
        SystemExit: in all other processes, so that an error is said once.
    """
    error: Exception | None = None
    if comm.get_local_rank() == 0:
        try:
            function()
        except Exception as raised:  # of any kind: the others would wait for ever
            error = raised
    failed = comm.all_gather(error is not None)
    if not any(failed):
        return
    if error is not None and comm.get_rank() == failed.index(True):
        raise error
    sys.exit(1)
