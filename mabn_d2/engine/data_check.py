"""The check of the datasets of a config."""

from typing import Any

from detectron2.config import CfgNode

from ..data.data_check import check_names, check_requirements
from ..data.requirements import DataRequirements
from ..data.samplers import check_sampler
from .errors import ConfigError, on_one_rank
from .evaluators import check_evaluators
from .metric_check import check_best_metric, check_lazy_best_metric
from .truth_check import check_truth


def check_data(cfg: CfgNode, train: bool = True, evaluators: bool = True) -> None:
    """Compare the datasets of a config with the config, and with each other, and log what is doubtful.

    `Trainer` does it; call it before, to do it before OUTPUT_DIR is written to. A second call for the
    same data does nothing. In a run of several processes all have to call it.

    Args:
        train: False if the config is used for an evaluation only, which ignores DATASETS.TRAIN.
        evaluators: whether DATASETS.TEST is evaluated by `Trainer.build_evaluator` as it stands.

    Raises:
        ConfigError: if there is no dataset, if one of DATASETS.TEST can't be evaluated, or if the
            evaluation does not give TEST.BEST_METRIC.
        DataError: if the sampler is wrong, or if the data can't be used or contradicts the config.
    """
    check_datasets(cfg, train, evaluators)
    check_requirements(DataRequirements.from_cfg(cfg, train))
    if evaluators:
        if train:
            check_best_metric(cfg)
        on_one_rank(lambda: check_truth(cfg))


def check_datasets(cfg: CfgNode, train: bool = True, evaluators: bool = True) -> None:
    """Check what is known of the datasets of a config before they are read.

    It takes no time, so a launcher can do it before it starts processes.

    Args:
        train, evaluators: as for `check_data`, whose errors apply.
    """
    key, purpose = ("TRAIN", "train") if train else ("TEST", "evaluate")
    if not cfg.DATASETS[key]:
        raise ConfigError(f"DATASETS.{key} is (): name a dataset to {purpose} on")
    check_names(DataRequirements.from_cfg(cfg, train))
    if evaluators:
        check_evaluators(cfg)
    if train:
        check_sampler(cfg)


def check_lazy_data(cfg: Any, train: bool = True) -> None:
    """Do what `check_data` does for a LazyConfig, before anything of it is instantiated.

    Only datasets of `get_detection_dataset_dicts` are known.

    Args:
        cfg: with Detectron2's nodes `dataloader` and `model`.
        train: False if the config is used for an evaluation only.

    Raises:
        ConfigError: if the evaluator does not give train.best_metric.
        DataError: if the data can't be used or contradicts the config.
    """
    check_requirements(DataRequirements.from_lazy(cfg, train))
    if train:
        check_lazy_best_metric(cfg)
