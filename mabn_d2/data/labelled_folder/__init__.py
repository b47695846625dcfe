"""Own images: a labelled folder as a labelling tool writes it becomes datasets of Detectron2."""

from .contents import LabelledFolder, read_folder
from .layouts import find_layout
from .register import PreparedFolder, prepare_folder, register_prepared
from .report import report
from .summary import mask_counts, mask_kind

__all__ = [
    "LabelledFolder",
    "PreparedFolder",
    "find_layout",
    "mask_counts",
    "mask_kind",
    "prepare_folder",
    "read_folder",
    "register_prepared",
    "report",
]
