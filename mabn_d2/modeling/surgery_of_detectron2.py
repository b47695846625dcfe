"""Registers Detectron2's classes with `mabn_d2.surgery`, which needs torch only."""

from importlib.util import find_spec

from detectron2.layers import Conv2d, CycleBatchNormList, FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.modeling.backbone import regnet

from ..surgery.batch_norms import BATCH_NORM_LISTS, PLAIN_BATCH_NORMS
from ..surgery.callers import RUN_IN_TURN
from ..surgery.convolutions import WITHOUT_BIAS, register_centred, register_when_used
from ..surgery.fold import STOCK
from ..surgery.fuse_relu import CONVS_WITH_ACTIVATION, FUSED_BLOCKS
from .convolutions import CenNormConv2d
from .fused_blocks import FusedBasicBlock, FusedBasicStem, FusedBottleneckBlock
from .stock_norms import FrozenBatchNormAct2d, cycle_batch_norms


def register() -> None:
    """Register the classes; called once, when `modeling` is imported."""
    register_centred(Conv2d, CenNormConv2d)
    CONVS_WITH_ACTIVATION.add(Conv2d)
    register_when_used("tridentnet.trident_conv.TridentConv", "mabn_d2.modeling.trident_conv")
    if find_spec("detectron2._C"):  # otherwise there are no deformable convolutions
        from .deform_conv import CenDeformConv, CenModulatedDeformConv

        for centred in (CenDeformConv, CenModulatedDeformConv):
            register_centred(centred.__base__, centred)
            CONVS_WITH_ACTIVATION.add(centred.__base__)
        WITHOUT_BIAS.add(CenDeformConv)
    PLAIN_BATCH_NORMS.add(NaiveSyncBatchNorm)
    BATCH_NORM_LISTS.add(CycleBatchNormList)
    STOCK["frozen_bn"] = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
    STOCK["per_level"] = cycle_batch_norms
    for fused in (FusedBasicStem, FusedBasicBlock, FusedBottleneckBlock):
        FUSED_BLOCKS[fused.__base__] = fused
    RUN_IN_TURN.update(
        cls.forward
        for cls in (
            regnet.ResStem,
            regnet.SimpleStem,
            regnet.VanillaBlock,
            regnet.BasicTransform,
            regnet.BottleneckTransform,
        )
    )
