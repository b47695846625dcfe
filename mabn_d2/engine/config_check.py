"""From the command line to a config that has been checked before any data is read."""

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.layers import get_norm
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..config import add_mabn_config
from ..config_files import config_names
from ..modeling.norm_table import NORMS
from ..safe_yaml import RefusedYAML, check_yaml, load_yaml
from .errors import ConfigError, did_you_mean, one_line
from .hooks.best_checkpoint import TASKS, task_of
from .launch import count_processes
from .model_check import check_model
from .own_data import use_folder_for
from .resume import check_output_folder, check_same_run
from .schedule import finalize_schedule
from .value_check import check_values

# Keys for which None is a value of its own: no override of WEIGHT_DECAY.
MAY_BE_NONE = ("SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS")

# yacs's message for a value of another type.
_MISMATCH = re.compile(
    r"Type mismatch \(<class '(?P<wanted>\S+)'> vs\. <class '(?P<found>\S+)'>\) "
    r"with values \(.* vs\. (?P<value>.*)\) for config key: (?P<key>\S+)"
)

# Iterations; each layer keeps two vectors of its channels for each.
MAX_WINDOW = 10_000

# torch's own, which takes no tensors on the CPU from several processes.
GPU_ONLY = ("SyncBN", "nnSyncBN")


def read_config(config_file: str, opts: Sequence[Any] = ()) -> CfgNode:
    """Return the config of a YAML file, changed by `opts`, a list of keys and values.

    Raises:
        ConfigError: for a file, key or value that can't be used.
    """
    cfg = get_cfg()
    add_mabn_config(cfg)
    defaults = cfg.clone()
    _check_is_file(config_file)
    _check_pairs(opts, defaults)
    try:
        check_yaml(config_file)
        cfg.merge_from_file(config_file)
        cfg.merge_from_list(opts)
        # yacs lets None take the place of any value, and then any value that of None: once more,
        # each against its default.
        merged = defaults.clone()
        merged.merge_from_other_cfg(cfg)
    except RefusedYAML as error:
        raise ConfigError(str(error)) from error
    except (AttributeError, KeyError, ValueError, AssertionError, OSError, yaml.YAMLError) as error:
        text = one_line(error.args[0] if isinstance(error, KeyError) and error.args else error, 500)
        if unknown := re.search(r"Non-existent (?:config )?key: (\S+)", text):
            key = unknown[1]
            raise ConfigError(
                f"{key} is no config key{did_you_mean(key, _leaves(defaults))}: correct it in "
                f"--config-file {config_file} or on the command line"
            ) from error
        if mismatch := _MISMATCH.search(text):
            raise ConfigError(_mismatch(defaults, **mismatch.groupdict())) from error
        words = " ".join([f"--config-file {config_file!r}", *map(str, opts)])
        raise ConfigError(f"{words}: {text}") from error
    nones = [key for key in _differences(merged, defaults) if _value(merged, key) is None]
    if nones := [key for key in nones if key not in MAY_BE_NONE]:
        raise ConfigError(f"{nones[0]} is None: give it a value, or leave it out for the default")
    return merged


def _check_is_file(config_file: str) -> None:
    if not config_file:
        raise ConfigError(
            "--config-file is missing: name one, such as configs/own_data_mask_rcnn_R50_FPN_mabn.yaml"
        )
    if "://" not in config_file and not PathManager.isfile(config_file):
        known = did_you_mean(config_file, [f"configs/{name}" for name in config_names()])
        raise ConfigError(
            f"--config-file is {config_file!r}, which is no file{known}: correct the path"
        )


def _check_pairs(opts: Sequence[Any], defaults: CfgNode) -> None:
    """Raise ConfigError if the options of a command line are no list of keys and values."""
    keys = set(_leaves(defaults))
    for key, value in zip_longest(map(str, opts[::2]), opts[1::2]):
        if key.startswith("--"):
            raise ConfigError(f"{key} comes after a KEY VALUE: put it before the first one")
        name, equals, after = key.partition("=")
        if equals:
            raise ConfigError(
                f"{key} is one word: write the key and the value as two, {name} {after}"
            )
        if len(opts) % 2 and (value is None or value in keys):
            raise ConfigError(f"{key} has no value: write KEY VALUE")


def _mismatch(defaults: CfgNode, wanted: str, found: str, value: str, key: str) -> str:
    """Return what to do about a value of another type than the default's."""
    default = _value(defaults, key)
    if isinstance(default, CfgNode):
        first = next(_leaves(default, f"{key}."))
        return f"{key} is {value}, but it has keys of its own: set one of them, such as {first}"
    example = repr(default)
    if wanted in ("tuple", "list"):
        element = repr(value) if found == "str" else value
        example = f"({element},)" if wanted == "tuple" else f"[{element}]"
    elif (wanted, found) == ("float", "int"):
        example = f"{value}.0"
    return f"{key} is {value} ({found}): use a value of type {wanted}, such as {example}"


def setup_config(args: Namespace, alone: bool = False) -> CfgNode:
    """Return the frozen config of Detectron2's command-line arguments.

    MODEL.DEVICE becomes "cpu" with --num-gpus 0 and where there is no GPU. `args.data`, a labelled
    folder, is the same as DATASETS.FOLDER: the config is set from it (`own_data.py`).

    Args:
        args: parsed by Detectron2's `default_argument_parser`.
        alone: the other processes of the run do not call this now.

    Raises:
        ConfigError: for a file, key or value that can't be used.
    """
    cfg = read_config(args.config_file, args.opts)
    if args.num_gpus == 0 or not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    _use_folder(cfg, args, alone)
    finalize_schedule(cfg, train=not args.eval_only)
    cfg.freeze()
    train = not args.eval_only
    check_config(cfg, count_processes(args), resume=args.resume, train=train)
    if (
        alone or comm.get_world_size() == 1
    ):  # one of several: `launch` has checked the model before it
        check_model(cfg, resume=args.resume, train=train)
    return cfg


def _use_folder(cfg: CfgNode, args: Namespace, alone: bool) -> None:
    """Set the config from the labelled folder that the command line or the config file names."""
    folder = getattr(args, "data", None)
    given = set(args.opts[::2])
    if folder and "DATASETS.FOLDER" in given:
        raise ConfigError(f"--data is {folder!r} and DATASETS.FOLDER is given too: leave one out")
    cfg.DATASETS.FOLDER = folder or cfg.DATASETS.FOLDER
    if cfg.DATASETS.FOLDER:
        # What a base of the config file says is a default; so are the datasets of any file.
        given |= {key for key in _keys_of_file(args.config_file) if not key.startswith("DATASETS.")}
        use_folder_for(cfg, given, args.resume, not args.eval_only, alone)


def _keys_of_file(config_file: str) -> set[str]:
    """Return the keys that a YAML config file sets itself, without those of its _BASE_."""
    return set(_leaves(load_yaml(config_file))) if config_file else set()


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def check_config(cfg: CfgNode, workers: int = 1, resume: bool = False, train: bool = True) -> None:
    """Raise ConfigError for what would fail later, or would not fail and be wrong.

    Args:
        workers: training processes on all machines.
        resume: weights come from OUTPUT_DIR if a checkpoint is there.
        train: False where the config is for evaluation only.
    """
    check_values(cfg, train)
    images, steps = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS
    if steps < 1:
        raise ConfigError(
            f"SOLVER.ACCUMULATION_STEPS is {steps}: use 1 for no accumulation, or the number of "
            "micro-batches in one optimizer iteration"
        )
    if train and (images < workers * steps or images % (workers * steps)):
        if images < workers or images % workers:
            raise ConfigError(
                f"SOLVER.IMS_PER_BATCH is {images}, no multiple of the {workers} training processes "
                "(--num-gpus times --num-machines): change one"
            )
        share = images // workers
        fitting = [n for n in range(1, share + 1) if share % n == 0]
        raise ConfigError(
            f"SOLVER.ACCUMULATION_STEPS is {steps}, which does not divide the {share} images that "
            f"each process has of SOLVER.IMS_PER_BATCH {images}: use one of "
            f"{', '.join(map(str, fitting))}, or change IMS_PER_BATCH"
        )
    if train:
        _check_evaluation(cfg)
    for name, row in NORMS.items():
        try:
            layer = row.layer(1, **row.settings(cfg), device="meta")  # checks the values
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"MODEL.{name}: {error}") from error
        window = getattr(layer, "window", 0) if row.has_window else 0
        if window > MAX_WINDOW:
            raise ConfigError(
                f"MODEL.{name}.SIMULATED_BATCH_SIZE is {cfg.MODEL[name].SIMULATED_BATCH_SIZE}, which "
                f"is {window} iterations, more than {MAX_WINDOW}: the paper's is 16, of 32 images"
            )
    for key, node in _norm_nodes(cfg):
        try:
            get_norm(node.NORM, 32)
        except KeyError as error:
            raise ConfigError(f"{key}.NORM: {error.args[0]}") from error
        if node.NORM in GPU_ONLY and train and workers > 1 and cfg.MODEL.DEVICE == "cpu":
            raise ConfigError(
                f"{key}.NORM is {node.NORM!r}, which needs GPUs where several processes train: use "
                '"naiveSyncBN", which runs on the CPU too'
            )
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                raise ConfigError(
                    f"DATASETS.{key} names {name!r}, which is not registered"
                    f"{did_you_mean(name, DatasetCatalog.list())}: use one of "
                    f"{', '.join(sorted(DatasetCatalog.list())[:3])}, ... or register it at import"
                )
    if train:
        _check_output(cfg, resume)
    weights = cfg.MODEL.WEIGHTS
    resumes = resume and PathManager.isfile(f"{cfg.OUTPUT_DIR}/last_checkpoint")
    if weights and "://" not in weights and not resumes and not PathManager.isfile(weights):
        raise ConfigError(
            f"MODEL.WEIGHTS is {weights!r}, which does not exist: "
            + (
                "download R50-wc.pth, the ImageNet weights of the MABN authors "
                "(https://github.com/megvii-model/MABN), and run tools/convert_weights.py "
                f"imagenet R50-wc.pth {weights}"
                if weights.endswith("R50-wc.pth")
                else "correct the path, or set it to '' to start from random weights"
            )
        )


def _check_output(cfg: CfgNode, resume: bool) -> None:
    """OUTPUT_DIR can be written to, and holds no other run."""
    folder = cfg.OUTPUT_DIR
    resumes = check_output_folder(folder, resume, "OUTPUT_DIR")
    if resumes and PathManager.isfile(f"{folder}/config.yaml"):
        with PathManager.open(f"{folder}/config.yaml") as file:
            check_same_run(cfg, file.read(), f"{folder}/config.yaml")


def _differences(node: CfgNode, other: CfgNode, prefix: str = "") -> Iterator[str]:
    """Yield the keys in which two nested configs differ."""
    for name in sorted({*node, *other}):
        key, value, theirs = f"{prefix}{name}", node.get(name), other.get(name)
        if isinstance(value, dict) and isinstance(theirs, dict):
            yield from _differences(value, theirs, f"{key}.")
        elif value != theirs:
            yield key


def _value(cfg: CfgNode, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def _norm_nodes(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, CfgNode]]:
    """Yield (key, node) of every node that has a NORM."""
    for name, value in node.items():
        if hasattr(value, "items"):
            key = f"{prefix}{name}"
            if isinstance(value.get("NORM"), str):
                yield key, value
            yield from _norm_nodes(value, f"{key}.")


def _check_evaluation(cfg: CfgNode) -> None:
    """Keys of what follows from an evaluation: the best checkpoint, early stopping."""
    metric, patience = cfg.TEST.BEST_METRIC, cfg.SOLVER.EARLY_STOPPING_PATIENCE
    task, name = task_of(metric), metric.rpartition("/")[2]
    if metric not in ("", "auto") and (task not in TASKS or not name):
        raise ConfigError(
            f'TEST.BEST_METRIC is {metric!r}: use "auto", "" or a scalar of the evaluation, such as '
            '"bbox/AP", "segm/AP50" or "validation/total_loss"'
        )
    if task == "validation" and not cfg.TEST.VALIDATION_LOSS:
        raise ConfigError(f"TEST.BEST_METRIC is {metric!r}, which needs TEST.VALIDATION_LOSS True")
    if task == "segm" and not cfg.MODEL.MASK_ON:
        raise ConfigError(
            f"TEST.BEST_METRIC is {metric!r}, but MODEL.MASK_ON is False: use bbox/{name}"
        )
    if patience < 0:
        raise ConfigError(
            f"SOLVER.EARLY_STOPPING_PATIENCE is {patience}: use 0 to train to the end, or a number of "
            "evaluations"
        )
    for needed, why in (
        (metric, 'TEST.BEST_METRIC, which is empty: use "auto"'),
        (
            cfg.TEST.EVAL_PERIOD > 0,
            f"TEST.EVAL_PERIOD, which is {cfg.TEST.EVAL_PERIOD}: set it to some iterations",
        ),
        (cfg.DATASETS.TEST, "DATASETS.TEST, which is empty: name a dataset"),
    ):
        if patience > 0 and not needed:
            raise ConfigError(f"SOLVER.EARLY_STOPPING_PATIENCE is {patience}, which needs {why}")
