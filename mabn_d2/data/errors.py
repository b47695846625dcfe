"""Errors of data that a user can correct."""

from collections.abc import Iterator
from contextlib import contextmanager


class DataError(ValueError):
    """Data that can't be used, or that contradicts the config: one line with the remedy.

    Attributes:
        said_elsewhere: whether another process of the run reports it.
    """

    said_elsewhere = False


def one_line(message: object, limit: int = 1000) -> str:
    """Return the text of a message or an exception on one line."""
    text = " ".join(str(message).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


@contextmanager
def copies_that_fit(folder: str) -> Iterator[None]:
    """Turn an error of the file system, while copies are written to a folder, into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"no copy of the annotations can be written to {folder} ({error.strerror}): free space "
            "there, or set TMPDIR to another folder"
        ) from error


class BadAnnotationError(DataError):
    """A COCO file that can't be used: one line with the file, the ids and the remedy."""
