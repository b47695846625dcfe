"""Run by test_faults.py as one of two machines: rank and folder are the arguments."""

import sys
import zlib

import torch
from detectron2.engine import launch

from mabn_d2.engine import Trainer
from mabn_d2.engine.hooks import SyncStatistics
from small_run import small_run


def main(rank, folder):
    cfg = small_run(folder, max_iter=20)
    cfg.MODEL.MABN.SYNC_BEFORE_EVAL = True
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
