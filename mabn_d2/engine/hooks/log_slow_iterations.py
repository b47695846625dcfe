"""A sign of life where iterations take long."""

import time

from detectron2.engine import HookBase
from detectron2.utils.events import EventWriter


class LogSlowIterations(HookBase):
    """Logs progress, with the time left, if Detectron2's last line is more than `seconds` old.

    PeriodicWriter logs every 20 iterations: every few seconds on a GPU, and after minutes of silence where an
    iteration has many micro-batches or runs on the CPU. A hook of the main process.

    Args:
        writer: what logs; Detectron2's CommonMetricPrinter.
        period: iterations between the lines of PeriodicWriter.
        seconds: the longest silence, up to one iteration more.
    """

    def __init__(self, writer: EventWriter, period: int = 20, seconds: float = 30.0):
        self.writer, self.period, self.seconds = writer, period, seconds

    def before_train(self) -> None:
        self.last = time.monotonic()

    def after_step(self) -> None:
        now, done = time.monotonic(), self.trainer.iter + 1
        if done % self.period == 0 or done == self.trainer.max_iter:
            self.last = now
        elif now - self.last >= self.seconds:
            self.writer.write()
            self.last = now
