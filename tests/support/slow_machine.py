"""tools/train_net.py on a machine that is slower than the others: what test_machines.py runs."""

import random
import time

from detectron2.engine import default_argument_parser

from mabn_d2.commands.train_net import run
from mabn_d2.engine import launch
from mabn_d2.engine.guarded_trainer import GuardedTrainer

run_step = GuardedTrainer.run_step


def late(trainer):
    time.sleep(random.uniform(0, 1))
    run_step(trainer)


def slow(args):
    GuardedTrainer.run_step = late
    return run(args)


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(slow, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,))
