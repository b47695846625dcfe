"""Hooks of the trainer, one a module."""

from .best_checkpoint import BestCheckpoint
from .draw_predictions import DrawPredictions
from .early_stopping import EarlyStopping, TrainingStopped
from .keep_newest import KeepNewest
from .log_slow_iterations import LogSlowIterations
from .log_statistics import LogStatistics
from .rank_states import KeepRankStates
from .recalibrate import RecalibrateMABN
from .stop_on_signal import StopOnSignal
from .sync_statistics import SyncStatistics
from .write_evaluations import WriteEvaluations

__all__ = [
    "BestCheckpoint",
    "DrawPredictions",
    "EarlyStopping",
    "KeepNewest",
    "KeepRankStates",
    "LogSlowIterations",
    "LogStatistics",
    "RecalibrateMABN",
    "StopOnSignal",
    "SyncStatistics",
    "TrainingStopped",
    "WriteEvaluations",
]
