"""Hooks of the trainer, one a module."""

from .log_statistics import LogStatistics
from .rank_states import KeepRankStates
from .recalibrate import RecalibrateMABN
from .stop_on_signal import StopOnSignal
from .sync_statistics import SyncStatistics

__all__ = [
    "KeepRankStates",
    "LogStatistics",
    "RecalibrateMABN",
    "StopOnSignal",
    "SyncStatistics",
]
