"""The rows of a comparison: a norm and the images that it normalizes."""

import re
from typing import NamedTuple

from ..engine import ConfigError

DEFAULT_ROWS = ("BN:2", "BRN:2", "GN:2", "MABN:2", "BN:8")


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        norm: name of the norm, as in a config.
        images: images of one process in one iteration.
        micro_batches: parts that these images are divided into, to accumulate their gradients.
        processes: processes that train together.
    """

    norm: str
    images: int
    micro_batches: int
    processes: int


def parse_row(text: str) -> Row:
    """Parse NORM:IMAGES[/MICRO][xPROCESSES], with MICRO the images of one micro-batch.

    Raises:
        ConfigError: if the text has another form, if MICRO does not divide IMAGES, or if it names a
            SyncBN of one process.
    """
    match = re.fullmatch(r"([^:]+):([1-9]\d*)(?:/([1-9]\d*))?(?:x([1-9]\d*))?", text)
    if not match:
        raise ConfigError(
            f"--rows {text!r}: write NORM:IMAGES[/MICRO][xPROCESSES], such as MABN:2, MABN:8/2 or "
            "MABN:2x4"
        )
    images = int(match[2])
    micro = int(match[3] or images)
    if images % micro:
        raise ConfigError(
            f"--rows {text!r}: {images} images can't be divided into micro-batches of {micro}"
        )
    row = Row(match[1], images, images // micro, int(match[4] or 1))
    if "SyncBN" in row.norm and row.processes == 1:
        raise ConfigError(
            f"--rows {text!r}: {row.norm} is BN in the one process of this row: use BN:{row.images}, "
            f"or {row.norm}:{row.images}xPROCESSES"
        )
    return row


def folder_of_row(row: str) -> str:
    """Return the name of the folder of a row's runs."""
    return row.replace(":", "_").replace("/", "_by_")


def row_of_folder(name: str) -> str | None:
    """Return the row whose runs are in a folder of this name; None if it is no such folder."""
    match = re.fullmatch(r"(.+?)_(\d+)(?:_by_(\d+))?(x\d+)?", name)
    if not match:
        return None
    norm, images, micro, processes = match.groups("")
    return f"{norm}:{images}{micro and f'/{micro}'}{processes}"
