"""The learning rate of a classifier's training."""

import math
from argparse import Namespace


def learning_rate(args: Namespace, iteration: int, epoch_iters: int) -> float:
    """Return the rate of an iteration, counted from 0.

    It depends on the iteration only, so a resumed run needs no state of the schedule.
    """
    warmup, total = args.warmup_epochs * epoch_iters, args.epochs * epoch_iters
    if iteration < warmup:
        return args.lr * (iteration + 1) / warmup
    if args.schedule == "cosine":
        return args.lr / 2 * (1 + math.cos(math.pi * (iteration - warmup) / (total - warmup)))
    return args.lr * 0.1 ** sum(iteration >= step * epoch_iters for step in args.steps)
