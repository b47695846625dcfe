"""Run by test_evaluators.py: two processes train a panoptic model; arguments: folder, stuff classes."""

import json
import sys

from detectron2.config import get_cfg
from detectron2.utils import comm

import other_datasets
from coco_datasets import read_rectangles
from mabn_d2 import add_mabn_config
from mabn_d2.engine import Trainer, launch, one_line_errors

CONFIG = "configs/digits/scratch_mask_rcnn_R18_FPN_mabn.yaml"


@one_line_errors()
def main(folder, stuff_classes):
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(CONFIG)
    read_rectangles(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "PanopticFPN"
    cfg.MODEL.RESNETS.DEPTH = 10
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = int(stuff_classes), 32
    cfg.DATALOADER.NUM_WORKERS, cfg.OUTPUT_DIR = 0, f"{folder}/output"
    with other_datasets.panoptic(folder, write=False) as names:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ((name,) for name in names["separated"])
        trainer = Trainer(cfg)
        trainer.train()
    if comm.is_main_process():
        with open(f"{folder}/results.json", "w") as file:
            json.dump(
                {task: len(values) for task, values in trainer._last_eval_results.items()}, file
            )


if __name__ == "__main__":
    launch(main, 2, dist_url="auto", args=tuple(sys.argv[1:]))
