"""Run by test_samplers.py in two processes: what each draws by Detectron2's samplers; then training."""

import json
import sys

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from mabn_d2 import add_mabn_config
from mabn_d2.data import register_digit_scenes
from mabn_d2.data.digit_scenes import SceneParams
from mabn_d2.data.loader import build_train_loader
from mabn_d2.engine import Trainer, launch

CONFIG = "configs/digits/scratch_mask_rcnn_R18_FPN_mabn.yaml"


def main(folder, samplers):
    register_digit_scenes(folder, "small_scenes", SceneParams(num_train=24, num_val=6))
    records = DatasetCatalog.get("small_scenes_train")
    classes = MetadataCatalog.get("small_scenes_train").thing_classes
    for name, part in (("first_half", records[:12]), ("second_half", records[12:])):
        DatasetCatalog.register(name, lambda part=part: part)
        MetadataCatalog.get(name).set(thing_classes=classes)
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(CONFIG)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 10
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("first_half", "second_half"), ()
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [["second_half", 3.0]]
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0, 0.5
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.5
    cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER = f"{folder}/output", 2
    drawn = {}
    for name in samplers:
        cfg.DATALOADER.SAMPLER_TRAIN = name
        batches = zip(range(24), build_train_loader(cfg).batch_sampler, strict=False)
        drawn[name] = [index for _, batch in batches for index, _ in batch]
    cfg.DATALOADER.SAMPLER_TRAIN = "WeightedTrainingSampler"
    trainer = Trainer(cfg)
    trainer.train()
    found = {"drawn": drawn, "iterations": trainer.iter}
    with open(f"{folder}/rank{comm.get_rank()}.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    launch(main, 2, dist_url="auto", args=(sys.argv[1], sys.argv[2:]))
