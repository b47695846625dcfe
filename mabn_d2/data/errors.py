"""Errors of data that a user can correct."""


class DataError(ValueError):
    """Data that can't be used, or that contradicts the config: one line with the remedy.

    Attributes:
        said_elsewhere: whether another process of the run reports it.
    """

    said_elsewhere = False


class BadAnnotationError(DataError):
    """A COCO file that can't be used: one line with the file, the ids and the remedy."""
