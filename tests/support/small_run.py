"""The config of the scripts that tests start in several processes."""

from detectron2.config import CfgNode, get_cfg

from mabn_d2 import add_mabn_config, register_digit_scenes
from mabn_d2.data.digit_scenes import SceneParams


def small_run(folder: str, max_iter: int) -> CfgNode:
    """Register digit scenes of 24 and 6 images in `folder`; return the digits config, narrower.

    The training is on the CPU, `max_iter` iterations long, and writes to `folder`/output.
    """
    register_digit_scenes(folder, "small_scenes", SceneParams(num_train=24, num_val=6))
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file("configs/digits/scratch_mask_rcnn_R18_FPN_mabn.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 10
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("small_scenes_train",), ("small_scenes_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.MAX_ITER = max_iter
    cfg.OUTPUT_DIR = f"{folder}/output"
    return cfg
