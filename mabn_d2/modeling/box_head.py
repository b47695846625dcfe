"""The box head in the published initial state."""

from typing import Any

from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY, FastRCNNConvFCHead
from torch import nn

from .registry import register


@register(ROI_BOX_HEAD_REGISTRY)
class PublishedConvFCHead(FastRCNNConvFCHead):
    """FastRCNNConvFCHead whose convolutions start as N(0, 0.01), as in the published detector.

    Detectron2's own start as kaiming_normal; fc layers are the same in both.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for conv in self.conv_norm_relus:
            nn.init.normal_(conv.weight, std=0.01)
