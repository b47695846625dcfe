"""Moving Average Batch Normalization (ICLR 2020) for Detectron2.

Importing this package registers it with Detectron2, if there is one: the norm types "MABN" and
"BRN", the backbones `build_mabn_*` and `build_any_norm_*`, a box head, the datasets `digit_scenes_*`.
`mabn_d2.layers` needs torch only.
"""

from importlib.util import find_spec

__version__ = "0.1.0"

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
    from .surgery.convert import convert_mabn
    from .surgery.fold import fold_mabn
    from .surgery.fuse_relu import fuse_relu, unfuse_relu
    from .surgery.recalibrate import update_mabn_stats

    register_digit_scenes()
    register_digit_scenes(name="digit_scenes_lit", params=LIT_SCENES)
    __all__ = [
        "CheckpointError",
        "Predictor",
        "SafeCheckpointer",
        "add_mabn_config",
        "configure_mabn",
        "convert_detector",
        "convert_imagenet",
        "convert_mabn",
        "fold_mabn",
        "fuse_relu",
        "load_predictor",
        "register_digit_scenes",
        "unfuse_relu",
        "update_mabn_stats",
        "warn_of_differences",
    ]


def setup_environment():
    """Do nothing: Detectron2 calls it where DETECTRON2_ENV_MODULE=mabn_d2, after the import."""
