"""A LazyConfig, checked before anything is trained or written.

A LazyConfig file is a program: loading it runs it. Use only files from sources that you trust.
"""

import copy
import logging
import math
import os
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
import yaml
from detectron2.config import LazyConfig, instantiate
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import differences as recorded_differences
from ..checkpoint import weights_file
from ..config_keys import differences
from ..data.errors import did_you_mean, one_line
from ..data.packages import remedy
from ..data.requirements import DataRequirements
from ..layers import MABN2d
from ..modeling.norm_table import NORMS
from ..safe_yaml import load_as_data
from ..solver import UntilTheEnd
from .config_reader import check_config_file, check_no_flags
from .errors import ConfigError
from .evaluators import missing_package
from .hooks.best_checkpoint import TASKS, auto_metric, task_of
from .hooks.log_statistics import LogStatistics
from .launch import count_processes
from .lazy_data import can_be_seeded, is_dataset_mapper, target
from .model_check import check_weights, quiet, without_data
from .resume import check_output_folder
from .value_check import warn_of_norm_schedule, warn_of_window

# Keys of `train`: Detectron2's, those that its default_setup reads, and this package's; besides, each
# norm of `NORMS` has its settings there.
TRAIN_KEYS = {
    "output_dir", "init_checkpoint", "max_iter", "amp", "ddp", "checkpointer", "eval_period",
    "log_period", "device", "seed", "cudnn_benchmark",
    "statistics", "accumulation_steps", "convert_weights", "bad_input",
    "validation_loss", "best_metric", "early_stopping_patience", "pictures",
}  # fmt: skip
NODES = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
_NEEDED = (
    "output_dir", "init_checkpoint", "max_iter", "amp", "checkpointer", "eval_period", "log_period",
    "device",
)  # fmt: skip
# Whole numbers of the config, and the least that they may be; None: any.
_AT_LEAST = {
    "train.max_iter": 1, "train.log_period": 1, "train.eval_period": 0, "train.seed": None,
    "train.checkpointer.period": 1, "train.checkpointer.max_to_keep": 1,
    "dataloader.train.total_batch_size": 1, "dataloader.train.num_workers": 0,
    "dataloader.test.num_workers": 0,
}  # fmt: skip
_BOOLEANS = (
    "train.amp.enabled", "train.cudnn_benchmark", "train.convert_weights", "train.ddp.fp16_compression",
)  # fmt: skip
# Keys of nodes of `train`; where the node is needed, so is the first.
_NODE_KEYS = {
    "amp": ("enabled",),
    "checkpointer": ("period", "max_to_keep", "file_prefix"),
    # `distribute` gives the module and the devices.
    "ddp": ("fp16_compression", *list(signature(DistributedDataParallel).parameters)[2:]),
}
# What must be the same in a run that is resumed, and why.
_MUST_STAY = {
    "model": "its checkpoint would not fit",
    "optimizer._target_": "the checkpoint has no state of the other optimizer",
    "dataloader.train.dataset": "the iteration and the schedule are those of the other images",
}
# Arguments of models that no weight and no loss depends on begin so: score threshold, NMS, ...
_OF_INFERENCE = ("test_", "combine_")


def load_lazy_config(args: Namespace) -> DictConfig:
    """Return the LazyConfig of Detectron2's command-line arguments; its file is run.

    `train.device` becomes "cpu" with --num-gpus 0 and where there is no GPU.

    Raises:
        ConfigError: for a file that does not exist, or an override that can't be used.
    """
    check_config_file(args.config_file, ".py")
    check_no_flags(args.opts)
    for override in args.opts:
        if "=" not in override and not override.startswith("~"):  # "~key" deletes
            raise ConfigError(f"{override} has no value: write KEY=VALUE")
    cfg = LazyConfig.load(args.config_file)
    try:
        cfg = LazyConfig.apply_overrides(cfg, args.opts)
    except Exception as error:  # hydra and omegaconf have many, without a base in common
        raise ConfigError(f"{' '.join(args.opts)}: {one_line(error, 300)}") from error
    missing = [name for name in NODES if name not in cfg]
    if missing:
        raise ConfigError(
            f"{args.config_file} has no {', '.join(missing)}: a config needs {', '.join(NODES)}"
        )
    if args.num_gpus == 0 or not torch.cuda.is_available():
        cfg.train.device = "cpu"
    return cfg


def check_lazy_config(cfg: DictConfig, args: Namespace) -> None:
    """Check `train`, the model, the weights and the output folder.

    Raises:
        ConfigError, CheckpointError: naming the key, its value and the remedy.
    """
    train = not args.eval_only
    _check_train(cfg.train)
    _check_types(cfg)
    processes = count_processes(args)
    steps = accumulation_steps(cfg, processes)
    _check_packages(cfg)
    if train:
        _check_data_keys(cfg)
        _check_evaluation(cfg)
    folder = cfg.train.output_dir
    if train:
        resumes = check_output_folder(folder, args.resume, "train.output_dir")
        if resumes:
            log_or_refuse_changes(cfg)
    weights = cfg.train.get("init_checkpoint") or ""
    resumes = args.resume and PathManager.isfile(f"{folder}/last_checkpoint")
    there = "://" in weights or PathManager.isfile(weights_file(weights))
    if weights and not resumes and not there:
        raise ConfigError(
            f"train.init_checkpoint is {weights!r}, which does not exist: correct the path, or set it "
            "to '' to start from random weights"
        )
    model = without_data(lambda _: instantiate(cfg.model), cfg.model, "model.")
    if train:
        _check_solver(cfg, model)
        images = cfg.dataloader.train.get("total_batch_size")
        if images and any(isinstance(module, MABN2d) for module in model.modules()):
            layer, share = MABN2d(1, **cfg.train.get("mabn", {})), images // (processes * steps)
            key, remedy = "train.mabn.batch_size", f"train.mabn.batch_size={share}"
            warn_of_window(layer.batch_size, layer.window, share, key, remedy)
    if train:
        _warn_of_norm_schedules(cfg, model)
    if train and "statistics" in cfg.train:
        _check_statistics(model, cfg.train.statistics)
    check_weights(
        model, weights, folder, args.resume, train, cfg.train.get("convert_weights", False),
        key="train.init_checkpoint",
    )  # fmt: skip


def _check_train(train: DictConfig) -> None:
    known = TRAIN_KEYS | {name.lower() for name in NORMS}
    for key in map(str, train):
        if key not in known:
            raise ConfigError(
                f"train.{key} is unknown{did_you_mean(key, known)}: nothing reads it; use one of "
                f"{', '.join(sorted(known))}"
            )
    for key in _NEEDED:
        if key not in train:
            raise ConfigError(f"train.{key} is missing: give it a value")
    for name, allowed in _NODE_KEYS.items():
        if name not in train:
            continue
        keys = train[name] if isinstance(train[name], DictConfig) else [train[name]]
        for key in keys:
            if key not in allowed:
                raise ConfigError(
                    f"train.{name} has {key!r}{did_you_mean(key, allowed)}: give {', '.join(allowed)}"
                )
        if name in _NEEDED and allowed[0] not in keys:
            raise ConfigError(f"train.{name}.{allowed[0]} is missing: give it a value")
    try:
        torch.device(train.device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f'train.device is {train.device!r}, which torch does not know: use "cuda" or "cpu"'
        ) from error
    for name, row in NORMS.items():
        try:
            row.layer(1, **train.get(name.lower(), {}), device="meta")  # checks the values
        except (TypeError, ValueError) as error:
            raise ConfigError(f"train.{name.lower()}: {one_line(error)}: correct it") from error


def _check_types(cfg: DictConfig) -> None:
    """Numbers and truth values; a text such as "no" would count as true."""
    for key, least in _AT_LEAST.items():
        value = OmegaConf.select(cfg, key)
        if value is None and key.removeprefix("train.") not in _NEEDED:
            continue
        if type(value) is not int or (least is not None and value < least):
            what = "" if least is None else f" of at least {least}"
            raise ConfigError(f"{key} is {value!r}: give a whole number{what}")
    for key in _BOOLEANS:
        value = OmegaConf.select(cfg, key)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{key} is {value!r}: use True or False")


def _check_solver(cfg: DictConfig, model: nn.Module) -> None:
    """The optimizer and the schedule can be built, and the schedule has values from 0 to the end.

    Args:
        model: as `without_data` builds it.
    """
    rate = cfg.optimizer.get("lr", 1.0)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
        raise ConfigError(f"optimizer.lr is {rate!r}: give a number above 0")
    optimizer = copy.deepcopy(cfg.optimizer)
    optimizer.params.model = model
    for key, node in (("optimizer", optimizer), ("lr_multiplier", cfg.lr_multiplier)):
        try:
            built = instantiate(node)
            if key == "lr_multiplier":
                schedule = UntilTheEnd(built)
                values = [schedule(where) for where in (0.0, 0.5, 1.0)]
                if not all(0 <= value < math.inf for value in values):
                    raise ValueError(f"the rate is multiplied by {values}")
        except Exception as error:  # a LazyConfig calls anything
            raise ConfigError(
                f"{key} can't be used ({type(error).__name__}: {one_line(error, 300)}): correct its "
                "values"
            ) from error


def _warn_of_norm_schedules(cfg: DictConfig, model: nn.Module) -> None:
    for name, row in NORMS.items():
        if any(isinstance(module, row.layer) for module in model.modules()):
            node = name.lower()
            layer = row.layer(1, **cfg.train.get(node, {}))
            values = {f"train.{node}.{key}": getattr(layer, key) for key in row.schedule}
            warn_of_norm_schedule(name, values, "train.max_iter", cfg.train.max_iter)


def _check_statistics(model: nn.Module, settings: DictConfig) -> None:
    try:
        LogStatistics(model, **{str(name): value for name, value in settings.items()})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"train.statistics: {one_line(error)}: correct it, or take train.statistics out"
        ) from error


def _check_packages(cfg: DictConfig) -> None:
    """The packages of Detectron2's evaluators, which import them after the training, are there."""
    nodes = cfg.dataloader.get("evaluator") or ()
    for node in nodes if isinstance(nodes, ListConfig) else (nodes,):
        if isinstance(node, DictConfig) and (package := missing_package(target(node))):
            raise ConfigError(
                f"dataloader.evaluator is {target(node).__name__}, which needs the package {package}: "
                f"{remedy(package)}, or use another evaluator"
            )


def _check_data_keys(cfg: DictConfig) -> None:
    policy = cfg.train.get("bad_input", "stop")
    if policy not in ("stop", "skip"):
        raise ConfigError(f'train.bad_input is {policy!r}: use "stop" or "skip"')
    if policy == "skip" and not can_be_seeded(cfg.dataloader.train):
        raise ConfigError(
            "train.bad_input is 'skip', but dataloader.train is not Detectron2's "
            "build_detection_train_loader with its own samplers: take train.bad_input out"
        )


def best_metric(cfg: DictConfig) -> str:
    """Return train.best_metric; for "auto", what `auto_metric` chooses for the model."""
    metric = cfg.train.get("best_metric") or ""
    if metric != "auto":
        return metric
    masks = DataRequirements.from_lazy(cfg).masks.value
    return auto_metric(getattr(target(cfg.model), "__name__", ""), masks)


def _check_evaluation(cfg: DictConfig) -> None:
    """Keys of what follows from an evaluation."""
    train, data = cfg.train, cfg.dataloader
    for key in ("early_stopping_patience", "pictures"):
        value = train.get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"train.{key} is {value!r}: give a whole number, 0 for none")
    losses = train.get("validation_loss", False)
    if not isinstance(losses, bool):
        raise ConfigError(f"train.validation_loss is {losses!r}: use True or False")
    metric, name = best_metric(cfg), train.get("best_metric")
    task = task_of(metric)
    if not isinstance(metric, str) or (metric and task not in TASKS):
        raise ConfigError(
            f'train.best_metric is {metric!r}: use "auto", "" or a scalar of the evaluation, such as '
            '"bbox/AP", "segm/AP50" or "validation/total_loss"'
        )
    if task == "validation" and not losses:
        raise ConfigError(f"train.best_metric is {name!r}, which needs train.validation_loss True")
    if metric and task != "validation" and "evaluator" not in data:
        raise ConfigError(
            f"train.best_metric is {name!r}, which needs dataloader.evaluator: set it"
        )
    if task == "segm" and not DataRequirements.from_lazy(cfg).masks.value:
        raise ConfigError(
            f"train.best_metric is {name!r}, but the model has no mask_head: use bbox/AP"
        )
    patience = train.get("early_stopping_patience", 0)
    if patience > 0 and not (metric and train.eval_period > 0):
        raise ConfigError(
            f"train.early_stopping_patience is {patience}, which needs train.best_metric and "
            f'train.eval_period, which are {name!r} and {train.eval_period}: set them, such as "auto"'
        )
    if losses:
        for part in ("train", "test"):
            if not is_dataset_mapper(data[part].get("mapper") if part in data else None):
                raise ConfigError(
                    f"train.validation_loss is True, which needs a DatasetMapper as dataloader.{part}."
                    "mapper: use one, or set it False"
                )
    if train.get("pictures", 0) and not DataRequirements.from_lazy(cfg).test.value:
        raise ConfigError(
            f"train.pictures is {train.pictures}, but dataloader.test.dataset.names or "
            "dataloader.evaluator is missing: set them, or train.pictures 0"
        )


def accumulation_steps(cfg: DictConfig, processes: int | None = None) -> int:
    """Return train.accumulation_steps, micro-batches in one iteration; 1 if it is not set.

    Args:
        processes: of the run; None: those that there are now.
    Raises:
        ConfigError: if it is no positive whole number, or does not divide the images of a process.
    """
    processes = processes or comm.get_world_size()
    steps = cfg.train.get("accumulation_steps", 1)
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(
            f"train.accumulation_steps is {steps!r}: use 1 for no accumulation, or the number of "
            "micro-batches in one iteration"
        )
    images = cfg.dataloader.train.get("total_batch_size")
    if images is not None and (images < steps * processes or images % (steps * processes)):
        raise ConfigError(
            f"dataloader.train.total_batch_size is {images}, no multiple of {steps} "
            f"(train.accumulation_steps) times {processes} (processes): change one"
        )
    return steps


def log_or_refuse_changes(cfg: DictConfig) -> list[str]:
    """Compare a config with the one in the folder of the run that it resumes.

    Returns:
        A line for each key that differs, and takes effect.
    Raises:
        ConfigError: for what can't change in the middle of a run.
    """
    path = f"{cfg.train.output_dir}/config.yaml"
    if not PathManager.isfile(path):
        return []
    try:
        old = load_as_data(path)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path} is no config ({one_line(error, 200)}): name another train.output_dir"
        ) from error
    with tempfile.TemporaryDirectory() as folder, quiet():
        LazyConfig.save(cfg, os.path.join(folder, "config.yaml"))
        new = load_as_data(os.path.join(folder, "config.yaml"))
    changes = {key: (was, now) for key, was, now in differences(old, new)}
    for prefix, reason in _MUST_STAY.items():
        for key, (was, now) in changes.items():
            name = key.rpartition(".")[2]
            of_inference = prefix == "model" and name.startswith(_OF_INFERENCE)
            if (key == prefix or key.startswith(f"{prefix}.")) and not of_inference:
                raise ConfigError(
                    f"{key} is {now!r}, but the run in train.output_dir {cfg.train.output_dir!r} has "
                    f"{was!r}: {reason}; name another folder, with train.init_checkpoint the last "
                    "checkpoint"
                )
    return [f"{key} {was} -> {now}" for key, (was, now) in changes.items()]


def warn_of_recorded(record: Mapping[str, Any] | None, cfg: DictConfig) -> None:
    """Log a warning for each setting of the input that weights were trained with another value of.

    Args:
        record: what a checkpoint says of its weights (`checkpoint/record.py`); None if nothing.
        cfg: the LazyConfig that they are loaded by.
    """
    part = "train" if OmegaConf.select(cfg, "dataloader.train.mapper") else "test"
    names = {
        "INPUT.FORMAT": f"dataloader.{part}.mapper.image_format",
        "MODEL.PIXEL_MEAN": "model.pixel_mean",
        "MODEL.PIXEL_STD": "model.pixel_std",
    }
    nodes: dict[str, dict[str, Any]] = {"INPUT": {}, "MODEL": {}}
    for key, name in names.items():
        value = OmegaConf.select(cfg, name)
        node, _, last = key.partition(".")
        nodes[node][last] = list(value) if isinstance(value, ListConfig) else value
    for line in recorded_differences(record, nodes):
        key, _, rest = line.partition(" ")
        logging.getLogger(__name__).warning(
            f"{names[key]} {rest}: change the config unless this is meant"
        )
