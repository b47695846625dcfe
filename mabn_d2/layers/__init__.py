"""The layers, which need torch only."""

from .cen_conv import CenConv2d, center_weight
from .mabn import MABN2d

__all__ = ["CenConv2d", "MABN2d", "center_weight"]
