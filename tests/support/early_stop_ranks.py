"""Run by test_evaluation_hooks.py: two processes train at a rate that moves nothing and stop early."""

import json
import sys

from detectron2.utils import comm

from mabn_d2.engine import Trainer, launch
from mabn_d2.engine.hooks import BestCheckpoint
from small_run import small_run


def main(folder):
    cfg = small_run(folder, max_iter=9)
    # Statistics of evaluation that do not move: the loss of all evaluations is the same.
    cfg.MODEL.MABN.MOMENTUM = 1.0
    cfg.SOLVER.BASE_LR, cfg.SOLVER.EARLY_STOPPING_PATIENCE = 1e-30, 1
    cfg.TEST.EVAL_PERIOD, cfg.TEST.VALIDATION_LOSS = 1, True
    cfg.TEST.BEST_METRIC = "validation/total_loss"
    trainer = Trainer(cfg)
    trainer.train()
    (best,) = [hook for hook in trainer._hooks if isinstance(hook, BestCheckpoint)]
    with open(f"{folder}/rank{comm.get_rank()}.json", "w") as file:
        json.dump({"iter": trainer.iter, "best": list(best.best)}, file)


if __name__ == "__main__":
    launch(main, 2, dist_url="auto", args=(sys.argv[1],))
