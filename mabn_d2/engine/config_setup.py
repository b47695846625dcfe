"""From the arguments of a command to a config that has been checked before any data is read."""

from argparse import Namespace

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..config import AUTO
from ..config_keys import leaves
from ..modeling.backbone import MABN_OR_ANOTHER
from ..modeling.norm import NORM
from ..safe_yaml import load_yaml
from .config_check import check_config
from .config_reader import read_config
from .errors import ConfigError
from .launch import count_processes
from .model_check import check_model
from .own_data import use_folder_for
from .schedule import finalize_schedule, scale_to_processes


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
    if not args.eval_only:
        _check_used(cfg, args)
    train, processes = not args.eval_only, count_processes(args)
    finalize_schedule(cfg, train=train)
    if train:
        cfg = scale_to_processes(cfg, processes)
    cfg.freeze()
    check_config(cfg, processes, resume=args.resume, train=train)
    if not args.resume:  # where the norm may not change any more
        _check_norms(cfg, args)
    if (
        alone or comm.get_world_size() == 1
    ):  # one of several: `launch` has checked the model before it
        check_model(cfg, resume=args.resume, train=train)
    return cfg


def _check_used(cfg: CfgNode, args: Namespace) -> None:
    """What the user gives for an automatic key must not end without effect.

    The config.yaml of a run has both keys.
    """
    given, in_file = args.opts[::2], _keys_of_file(args.config_file)
    for key, sets in (("EPOCHS", "MAX_ITER"), ("LR_FOR_16_IMAGES", "BASE_LR")):
        value = cfg.SOLVER[sets]
        of_base = f"SOLVER.{key}" in in_file and f"SOLVER.{sets}" not in {*given, *in_file}
        if (of_base or f"SOLVER.{key}" in given) and value != AUTO:
            raise ConfigError(
                f"SOLVER.{key} is {cfg.SOLVER[key]}, but SOLVER.{sets} is {value}, which comes first: "
                f"set SOLVER.{sets} {type(value)(AUTO)} too"
            )


def _check_norms(cfg: CfgNode, args: Namespace) -> None:
    """The backbones of MABN take the default norms, but not from a user who asks for them.

    The config.yaml of a run has every key, so that these norms may be the defaults there.
    """
    name, in_file = cfg.MODEL.BACKBONE.NAME, _keys_of_file(args.config_file)
    backbones = {"RESNETS": "build_mabn_resnet", "FPN": "build_mabn_resnet_fpn"}
    for node, prefix in backbones.items():
        key, value = f"MODEL.{node}.NORM", cfg.MODEL[node].NORM
        asked = key in in_file and not {f"MODEL.{node}.{k}" for k in cfg.MODEL[node]} <= in_file
        if name.startswith(prefix) and value != NORM and (asked or key in args.opts[::2]):
            raise ConfigError(
                f"{key} is {value!r}, which {name} does not support: set it to {MABN_OR_ANOTHER}"
            )


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
    return set(leaves(load_yaml(config_file))) if config_file else set()
