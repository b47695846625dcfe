"""Run by test_data_check_ranks.py: two processes check and load a dataset; arguments: folder, policy."""

import json
import os
import sys

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from detectron2.utils import comm

from coco_datasets import CLASSES, SIZE, read_rectangles
from mabn_d2 import add_mabn_config
from mabn_d2.engine import Trainer, launch, one_line_errors

CONFIG = "configs/digits/scratch_mask_rcnn_R18_FPN_mabn.yaml"


@one_line_errors()
def main(folder, policy):
    parsed, load = [], json.load
    json.load = lambda file: parsed.append(os.path.basename(file.name)) or load(file)
    for split in ("train", "val"):
        file = f"{folder}/{split}.json"
        register_coco_instances(f"ranks_{split}", {}, file, f"{folder}/{split}")
    boxes = [5, 5, 30, 30], [SIZE + 5, 5, 30, 30]
    image = {
        "file_name": f"{folder}/train/0.png", "image_id": 9, "height": SIZE, "width": SIZE,
        "annotations": [
            {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0,
             "segmentation": [[5, 5, 30, 5, 30, 30]]}
            for box in boxes
        ],
    }  # fmt: skip
    DatasetCatalog.register("ranks_by_hand", lambda: [image])
    MetadataCatalog.get("ranks_by_hand").set(thing_classes=CLASSES)
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(CONFIG)
    read_rectangles(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 10
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("ranks_train", "ranks_by_hand"), ("ranks_val",)
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.BAD_INPUT = 0, policy
    cfg.OUTPUT_DIR = f"{folder}/output"
    trainer = Trainer(cfg)
    records = list(trainer.data_loader.dataset.records)
    before = [name for name in parsed if name.endswith(".json")]
    trainer.train()
    found = {
        "parsed": before,
        "records": records,
        "results": comm.is_main_process() and trainer._last_eval_results["segm"]["AP"],
    }
    with open(f"{folder}/rank{comm.get_rank()}.json", "w") as file:
        json.dump(found, file, default=str)


if __name__ == "__main__":
    launch(main, 2, dist_url="auto", args=tuple(sys.argv[1:]))
