"""Training and evaluation."""

from .config_check import check_config
from .config_reader import read_config
from .config_setup import setup_config
from .data_check import check_data
from .errors import ConfigError, one_line_errors
from .launch import launch
from .model_check import check_model
from .own_data import use_folder
from .trainer import Trainer

__all__ = [
    "ConfigError",
    "Trainer",
    "check_config",
    "check_data",
    "check_model",
    "launch",
    "one_line_errors",
    "read_config",
    "setup_config",
    "use_folder",
]
