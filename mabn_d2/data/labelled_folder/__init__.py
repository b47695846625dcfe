"""Own images: a labelled folder as a labelling tool writes it becomes datasets of Detectron2."""

from .contents import LabelledFolder, read_folder
from .layouts import find_layout
from .register import Registered, register_folder
from .summary import mask_counts, mask_kind, table

__all__ = [
    "LabelledFolder",
    "Registered",
    "find_layout",
    "mask_counts",
    "mask_kind",
    "read_folder",
    "register_folder",
    "table",
]
