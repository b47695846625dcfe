"""Errors of data that a user can correct."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any


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


def did_you_mean(word: object, known: Any) -> str:
    """Return " (did you mean X?)" if a known word is close, and an empty text if none is."""
    close = get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


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
