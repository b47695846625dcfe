"""Every evaluation in the files of metrics."""

from collections.abc import Sequence

from detectron2.engine import HookBase
from detectron2.utils.events import CommonMetricPrinter, EventWriter


class WriteEvaluations(HookBase):
    """Writes the scalars after each evaluation.

    Detectron2's PeriodicWriter writes the newest value of each scalar every 20 iterations, so a shorter
    period of evaluations loses the others. Place it behind the hooks that evaluate.

    Args:
        period: iterations between evaluations; 0: none while the model trains.
        writers: those of PeriodicWriter, which closes them; what prints progress is left out.
    """

    def __init__(self, period: int, writers: Sequence[EventWriter]):
        self.period = period
        self.writers = [w for w in writers if not isinstance(w, CommonMetricPrinter)]

    def after_step(self) -> None:
        if self.period > 0 and (self.trainer.iter + 1) % self.period == 0:
            for writer in self.writers:
                writer.write()
