"""Run by test_faults.py as one of two machines: rank and folder are the arguments."""

import sys
import zlib

import torch
from detectron2.config import get_cfg
from detectron2.engine import launch

from mabn_d2 import add_mabn_config, register_digit_scenes
from mabn_d2.data.digit_scenes import SceneParams
from mabn_d2.engine import Trainer
from mabn_d2.engine.hooks import SyncStatistics

CONFIG = "configs/digits/scratch_mask_rcnn_R18_FPN_mabn.yaml"


def main(rank, folder):
    register_digit_scenes(folder, "small_scenes", SceneParams(num_train=24, num_val=6))
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(CONFIG)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 10
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.MABN.SYNC_BEFORE_EVAL = True
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("small_scenes_train",), ("small_scenes_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.MAX_ITER = 20
    cfg.OUTPUT_DIR = f"{folder}/output"
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    batches = iter(trainer.data_loader)

    def changed():
        for iteration, batch in enumerate(batches):
            for record in batch if rank == 1 else ():
                record["instances"] = record["instances"][:0]
                if iteration == 5:  # this rank's forward fails: both must reject the batch
                    record["image"] = record["image"].float()
                    record["image"][:, 3, 3] = torch.nan
            yield batch

    trainer._trainer._data_loader_iter_obj = changed()
    (sync,) = [hook for hook in trainer._hooks if isinstance(hook, SyncStatistics)]
    average, own = sync.average, []

    def averaged():
        own.append([buffer.clone() for buffer in sync.buffers])
        average()

    sync.average = averaged
    trainer.train()
    assert trainer._trainer.rejected == 1
    torch.save(trainer.model.module.state_dict(), f"{folder}/rank{rank}.pth")
    torch.save({"own": own[-1], "mean": sync.buffers}, f"{folder}/variances{rank}.pth")


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), sys.argv[2]
    # The port follows from the folder, so that tests side by side do not meet.
    url = f"tcp://127.0.0.1:{20000 + zlib.crc32(folder.encode()) % 10000}"
    launch(main, 1, 2, rank, url, (rank, folder))
