"""Run by test_samplers.py in two processes: what each draws by Detectron2's samplers; then training."""

import json
import sys

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from mabn_d2.data.loader import build_train_loader
from mabn_d2.engine import Trainer, launch
from small_run import small_run


def main(folder, samplers):
    cfg = small_run(folder, max_iter=2)
    records = DatasetCatalog.get("small_scenes_train")
    classes = MetadataCatalog.get("small_scenes_train").thing_classes
    for name, part in (("first_half", records[:12]), ("second_half", records[12:])):
        DatasetCatalog.register(name, lambda part=part: part)
        MetadataCatalog.get(name).set(thing_classes=classes)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("first_half", "second_half"), ()
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [["second_half", 3.0]]
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = cfg.DATALOADER.REPEAT_THRESHOLD = 0.5
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
