"""Moving Average Batch Normalization (ICLR 2020) for Detectron2.

The layers and the conversion of built models need torch only. If Detectron2 is installed, importing
this package registers it there: the norm types "MABN" and "BRN", the backbones `build_mabn_*` and
`build_any_norm_*`, a box head, the datasets `digit_scenes_*`.
"""

from importlib.util import find_spec

from .config_files import get_config_file
from .layers import BatchRenorm2d, CenConv2d, MABN2d, rescale_mabn_windows
from .surgery.convert import convert_mabn
from .surgery.fold import fold_mabn
from .surgery.fuse_relu import fuse_relu, unfuse_relu
from .surgery.recalibrate import update_mabn_stats

__version__ = "0.2.0.dev0"

__all__ = [
    "BatchRenorm2d",
    "CenConv2d",
    "MABN2d",
    "convert_mabn",
    "fold_mabn",
    "fuse_relu",
    "get_config_file",
    "rescale_mabn_windows",
    "unfuse_relu",
    "update_mabn_stats",
]
_imported = _wanted_by_detectron2 = False


def setup_environment() -> None:
    """Extend Detectron2 for a script that does not know this package (`engine/unmodified_scripts.py`).

    Detectron2 calls this while it is imported, if DETECTRON2_ENV_MODULE=mabn_d2. Where this package
    is imported first, that is in the middle of its own import, and waits for the end of it.
    """
    global _wanted_by_detectron2
    _wanted_by_detectron2 = True
    if _imported:
        from .engine.unmodified_scripts import extend_detectron2

        extend_detectron2()


if find_spec("detectron2"):
    from . import modeling  # noqa: F401 (for its registration)
    from .checkpoint import (
        CheckpointError,
        SafeCheckpointer,
        convert_detector,
        convert_imagenet,
        warn_of_differences,
    )
    from .config import add_mabn_config
    from .data import LIT_SCENES, register_digit_scenes
    from .modeling import configure_mabn
    from .predictor import Predictor, load_predictor

    register_digit_scenes()
    register_digit_scenes(name="digit_scenes_lit", params=LIT_SCENES)
    __all__ += [
        "CheckpointError",
        "Predictor",
        "SafeCheckpointer",
        "add_mabn_config",
        "configure_mabn",
        "convert_detector",
        "convert_imagenet",
        "load_predictor",
        "register_digit_scenes",
        "warn_of_differences",
    ]

_imported = True
if _wanted_by_detectron2:
    setup_environment()
