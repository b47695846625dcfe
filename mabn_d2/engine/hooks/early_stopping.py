"""An end of the training when evaluations get no better."""

import logging

from detectron2.engine import HookBase
from detectron2.utils import comm

from .best_checkpoint import BestCheckpoint
from .rank_states import KeepRankStates


class TrainingStopped(BaseException):
    """Leaves the training loop as planned: no Exception, which Detectron2 would log as an error."""


class EarlyStopping(HookBase):
    """Ends the training when `patience` evaluations in a row have not been better than the best.

    `model_final.pth` is written first, as at the end of the schedule. All ranks stop after the same
    iteration, because they know the same best value. A run that has stopped stops again, before its
    first iteration, if it is resumed with the same patience.

    Place it behind the BestCheckpoint.

    Args:
        best: the hook that knows the best evaluation.
        patience: number of evaluations.
        rank_states: gathers what the checkpoint keeps of the other ranks.
        key: what the config calls the patience, for messages.
    Raises:
        TrainingStopped: to end the training.
    """

    def __init__(
        self,
        best: BestCheckpoint,
        patience: int,
        rank_states: KeepRankStates | None = None,
        key: str = "SOLVER.EARLY_STOPPING_PATIENCE",
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience must be positive, got {patience}")
        self.best, self.patience, self.rank_states = best, patience, rank_states
        self.key = key

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if 0 < self.best.best.evaluated <= start < self.trainer.max_iter and self._is_over():
            raise TrainingStopped(self._reason())

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        # The best checkpoint looks at the last evaluation of a schedule after the training.
        if self.best.best.evaluated != done or not self._is_over():
            return
        if self.rank_states is not None:
            self.rank_states.gather()
        if comm.is_main_process():
            self.best.checkpointer.save("model_final", iteration=self.trainer.iter)
        comm.synchronize()
        raise TrainingStopped(self._reason())

    def _is_over(self) -> bool:
        best = self.best.best
        if best.value is None:
            return False
        return best.evaluated - best.iterations >= self.patience * self.best.period

    def _reason(self) -> str:
        best = self.best.best
        reason = (
            f"stopped after {best.evaluated} iterations: {best.metric} has not been better than "
            f"{best.value:.3f} (after {best.iterations}) in {self.patience} evaluations ({self.key})"
        )
        logging.getLogger(__name__).info(reason)
        return reason
