"""Configs of the repository, for the CPU, at full width or narrow."""

from detectron2.config import get_cfg

from mabn_d2 import add_mabn_config
from mabn_d2.engine.schedule import finalize_schedule
from paths import ROOT

# Widths that every norm takes: GroupNorm has 32 groups.
NARROW = [
    "MODEL.RESNETS.STEM_OUT_CHANNELS",
    32,
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    32,
    "MODEL.FPN.OUT_CHANNELS",
    32,
    "MODEL.ROI_BOX_HEAD.CONV_DIM",
    32,
    "MODEL.ROI_BOX_HEAD.FC_DIM",
    32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM",
    32,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM",
    32,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    16,
    "MODEL.RPN.POST_NMS_TOPK_TEST",
    20,
]


def load(name):
    """Return the config of a file of configs/, for the CPU and 2 images, without weights."""
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / name))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "SOLVER.IMS_PER_BATCH", 2])
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    finalize_schedule(cfg, num_images=100)
    return cfg


def narrow(name):
    """Return the config of `load` with few channels, so that a step is fast."""
    cfg = load(name)
    width = max(32 // cfg.MODEL.RESNETS.NUM_GROUPS, 1)
    cfg.merge_from_list([*NARROW, "MODEL.RESNETS.WIDTH_PER_GROUP", width])
    return cfg
