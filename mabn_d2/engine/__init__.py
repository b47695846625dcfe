"""Training and evaluation."""

from .setup import ConfigError, check_config, check_data, setup_config
from .trainer import Trainer

__all__ = ["ConfigError", "Trainer", "check_config", "check_data", "setup_config"]
