"""Log output of this package."""

import logging

from .errors import ONE_LINE, shows_traceback


class _WithoutTraceback(logging.Filter):
    """Leaves the traceback out of what Detectron2 logs for an error that is the user's to correct."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, ONE_LINE) and not shows_traceback():
            record.msg, record.args, record.exc_info = f"{record.getMessage()} {error}", (), None
        return True


_without_traceback = _WithoutTraceback()  # one, which a logger takes once


def share_log() -> None:
    """Log where Detectron2 logs: the terminal and the run's log.txt.

    Detectron2's `setup_logger` sets up its own loggers only. To be called after it.
    """
    ours, theirs = logging.getLogger("mabn_d2"), logging.getLogger("detectron2")
    reached = {*ours.handlers, *logging.getLogger().handlers}  # ours passes records on to the root
    for handler in theirs.handlers:
        if handler not in reached:
            ours.addHandler(handler)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_without_traceback)
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)
