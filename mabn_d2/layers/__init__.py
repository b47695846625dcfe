"""The norm layers and the centred convolution. They need torch only."""

from . import distributed  # noqa: F401 (registers its hook)
from .batch_renorm import BatchRenorm2d
from .cen_conv import CenConv2d, center_weight
from .cen_conv_transpose import CenConvTranspose2d, center_transposed_weight
from .loss_scale import rescale_mabn_windows
from .mabn import MABN2d
from .norm_act import MABNAct2d, SplitMABNAct2d
from .per_level import PerLevelNorm
from .split_norms import SplitBatchNorm2d, SplitBatchRenorm2d, SplitMABN2d

__all__ = [
    "BatchRenorm2d",
    "CenConv2d",
    "CenConvTranspose2d",
    "MABN2d",
    "MABNAct2d",
    "PerLevelNorm",
    "SplitBatchNorm2d",
    "SplitBatchRenorm2d",
    "SplitMABN2d",
    "SplitMABNAct2d",
    "center_transposed_weight",
    "center_weight",
    "rescale_mabn_windows",
]
