"""An end by SIGTERM or SIGINT that loses nothing."""

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from ...checkpoint import SafeCheckpointer
from .rank_states import KeepRankStates


class StopOnSignal(HookBase):
    """On SIGTERM or SIGINT: finishes the iteration, writes a checkpoint, exits with 128 + signal.

    A signal to any rank stops all of them after the same iteration. A second signal ends the
    process at once, as it would without this hook, unless it comes within a second: then it is
    the same one, by way of the process group or of the parent.

    Args:
        checkpointer: writes the checkpoint; None if the loop, which reads `received`, does it.
        rank_states: a `KeepRankStates`, whose statistics of all ranks the checkpoint gets.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    SAME = 1.0  # seconds

    def __init__(
        self, checkpointer: SafeCheckpointer | None, rank_states: KeepRankStates | None = None
    ) -> None:
        self.checkpointer, self.rank_states = checkpointer, rank_states
        self.received = 0
        self._before: dict[int, Any] = {}  # signal -> its handler
        self._process = os.getpid()

    def before_train(self) -> None:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {s: signal.signal(s, self._receive) for s in self.SIGNALS}

    def after_train(self) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child that was forked from this one, such as a pool's
            self._restore()
            os.kill(os.getpid(), number)
        elif not self.received:
            self.received, self._time = number, time.monotonic()
        elif time.monotonic() - self._time > self.SAME:
            self._restore()
            os.kill(os.getpid(), number)

    def after_step(self) -> None:
        # Detectron2 gathers metrics over the ranks in every iteration by the same means.
        received = max(comm.all_gather(self.received))
        iteration = self.trainer.iter
        if not received or iteration + 1 >= self.trainer.max_iter:
            return
        if self.rank_states is not None:
            self.rank_states.gather()
        if self.checkpointer is not None and comm.is_main_process():
            self.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        comm.synchronize()
        logging.getLogger(__name__).warning(
            f"{signal.Signals(received).name} after iteration {iteration}: go on with --resume"
        )
        raise SystemExit(128 + received)
