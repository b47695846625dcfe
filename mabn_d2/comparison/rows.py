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
        processes: processes that train together.
    """

    norm: str
    images: int
    processes: int


def parse_row(text: str) -> Row:
    """Parse NORM:IMAGES or NORM:IMAGESxPROCESSES.

    Raises:
        ConfigError: if the text has another form, or names a SyncBN of one process.
    """
    match = re.fullmatch(r"([^:]+):(\d+)(?:x([1-9]\d*))?", text)
    if not match:
        raise ConfigError(
            f"--rows {text!r}: write NORM:IMAGES or NORM:IMAGESxPROCESSES, such as MABN:2 or MABN:2x4"
        )
    row = Row(match[1], int(match[2]), int(match[3] or 1))
    if "SyncBN" in row.norm and row.processes == 1:
        raise ConfigError(
            f"--rows {text!r}: {row.norm} is BN in the one process of this row: use BN:{row.images}, "
            f"or {row.norm}:{row.images}xPROCESSES"
        )
    return row
