"""Log output of this package."""

import logging


def share_log() -> None:
    """Log where Detectron2 logs: the terminal and the run's log.txt.

    Detectron2's `setup_logger` sets up its own loggers only. To be called after it.
    """
    ours, theirs = logging.getLogger("mabn_d2"), logging.getLogger("detectron2")
    reached = {*ours.handlers, *logging.getLogger().handlers}  # ours passes records on to the root
    for handler in theirs.handlers:
        if handler not in reached:
            ours.addHandler(handler)
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)
