"""Run by test_evaluation_hooks.py: two processes train at a rate that moves nothing and stop early."""

import json
import sys

from detectron2.config import get_cfg
from detectron2.utils import comm

from mabn_d2 import add_mabn_config, register_digit_scenes
from mabn_d2.data.digit_scenes import SceneParams
from mabn_d2.engine import Trainer, launch
from mabn_d2.engine.hooks import BestCheckpoint

CONFIG = "configs/digits/scratch_mask_rcnn_R18_FPN_mabn.yaml"


def main(folder):
    register_digit_scenes(folder, "small_scenes", SceneParams(num_train=24, num_val=6))
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(CONFIG)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    # Statistics of evaluation that do not move: the loss of all evaluations is the same.
    cfg.MODEL.MABN.MOMENTUM = 1.0
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("small_scenes_train",), ("small_scenes_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.EARLY_STOPPING_PATIENCE = 9, 1e-30, 1
    cfg.TEST.EVAL_PERIOD, cfg.TEST.VALIDATION_LOSS = 1, True
    cfg.TEST.BEST_METRIC = "validation/total_loss"
    cfg.OUTPUT_DIR = f"{folder}/output"
    trainer = Trainer(cfg)
    trainer.train()
    (best,) = [hook for hook in trainer._hooks if isinstance(hook, BestCheckpoint)]
    with open(f"{folder}/rank{comm.get_rank()}.json", "w") as file:
        json.dump({"iter": trainer.iter, "best": list(best.best)}, file)


if __name__ == "__main__":
    launch(main, 2, dist_url="auto", args=(sys.argv[1],))
