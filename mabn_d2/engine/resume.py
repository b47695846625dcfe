"""What a resumed run takes from its checkpoint, and what from its config.

Weights, statistics, momenta and the iteration come from the checkpoint. Every setting comes from the
config: torch's optimizers would bring the rates and decays of the checkpoint back in silence.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.utils.file_io import PathManager
from torch import nn

from ..checkpoint import CheckpointError
from ..checkpoint.io import check_writable
from ..checkpoint.record import SAME_WITH_MABN
from ..config_keys import differences
from ..data.errors import one_line
from ..modeling.norm import NORM
from ..modeling.norm_table import NORMS
from .errors import ConfigError

# MODEL must stay the same for a checkpoint to fit, but for these keys, the settings of norms and what
# has TEST in its name, such as the score threshold.
MODEL_MAY_CHANGE = ("MODEL.WEIGHTS", "MODEL.DEVICE", "MODEL.PANOPTIC_FPN.COMBINE.")
# Keys that may not change besides, and why.
MUST_STAY = {
    "SOLVER.OPTIMIZER": "the checkpoint has no state of the other optimizer",
    "DATASETS.TRAIN": "the iteration and the schedule are those of the other images",
}
# Keys that say where and how, but not what is computed.
_NOT_LOGGED = ("OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "VERSION")

_logger = logging.getLogger(__name__)


def check_output_folder(
    folder: str, resume: bool, key: str, remedy: str = "add --resume to go on with it"
) -> bool:
    """Check that a folder can be written to, without creating it, and holds no other run.

    Args:
        folder: where a run writes.
        resume: go on with a run that is there.
        key: what the config calls the folder.
        remedy: how to go on with a run that is there.
    Returns:
        Whether there is a run to go on with.
    Raises:
        ConfigError: if it can't be written to, or holds a run that is not resumed.
    """
    try:
        if "://" not in folder:
            check_writable(folder)
    except OSError as error:
        raise ConfigError(f"{key} {folder!r} can't be written to: {error}") from error
    last = last_checkpoint(folder)
    if last and not resume:
        raise ConfigError(
            f"{key} {folder!r} holds the checkpoints of a run: {remedy}, or name another folder"
        )
    if not last and "://" not in folder and (found := sorted(Path(folder).glob("model_*.pth"))):
        raise ConfigError(
            f"{key} {folder!r} holds the checkpoints of a run, such as {found[-1].name}, but no file "
            "last_checkpoint: name another folder, or write the name of the checkpoint to resume from "
            "into that file"
        )
    if resume and not last:
        _logger.warning(f"{key} {folder!r} has no checkpoint to resume from: a new run starts")
    return last is not None


def last_checkpoint(folder: str) -> str | None:
    """Return the path of the checkpoint that a run in a folder goes on from; None if there is none.

    Raises:
        ConfigError: if the file that names it is damaged.
    """
    pointer = f"{folder}/last_checkpoint"
    if not PathManager.isfile(pointer):
        return None
    with PathManager.open(pointer, "rb") as file:
        name = file.read(1000).decode(errors="replace").strip()
    if not name or not name.isprintable():
        raise ConfigError(
            f"{pointer} is damaged: write the name of a checkpoint of this folder into it, such as "
            "model_final.pth"
        )
    return f"{folder}/{name}"


def check_same_run(cfg: CfgNode, text: str, source: str) -> list[str]:
    """Compare the config of a run that is resumed with the config that it began with.

    Args:
        cfg: what it is resumed with.
        text: the other config as YAML.
        source: where that comes from, for messages.
    Returns:
        A line for each setting that differs, and takes effect.
    Raises:
        ConfigError: for a setting that can't change in the middle of a run.
    """
    try:
        old = yaml.safe_load(text)
        old["MODEL"], old["SOLVER"]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{source} is no config of this program ({one_line(error, 200)}): name another OUTPUT_DIR"
        ) from error
    new = yaml.safe_load(cfg.dump())  # from YAML too, which has no tuples
    changes = {key: (was, now) for key, was, now in differences(old, new)}
    if set(changes.get("MODEL.BACKBONE.NAME", ())) == SAME_WITH_MABN and cfg.MODEL.FPN.NORM == NORM:
        del changes["MODEL.BACKBONE.NAME"]
    may_change = (*MODEL_MAY_CHANGE, *(f"MODEL.{name}." for name in NORMS))
    model = [
        key
        for key in changes
        if key.startswith("MODEL.") and not key.startswith(may_change) and "TEST" not in key
    ]
    if model:
        raise ConfigError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR!r} holds a run with other {', '.join(model[:5])}: name "
            "another folder"
        )
    for key, reason in MUST_STAY.items():
        if key in changes:
            was, now = changes[key]
            raise ConfigError(
                f"{key} is {now}, but the run in OUTPUT_DIR {cfg.OUTPUT_DIR!r} has {was}: {reason}; "
                "start a run of its own in another folder, with MODEL.WEIGHTS the last checkpoint"
            )
    return [
        f"{key} {was} -> {now}"
        for key, (was, now) in changes.items()
        if not key.startswith(_NOT_LOGGED)
    ]


def log_changes(lines: list[str], iteration: int | str) -> None:
    """Log which settings a run goes on with that differ from those so far."""
    if lines:
        _logger.warning(
            f"settings that differ from those of the run so far, from iteration {iteration} on: "
            + "; ".join(lines)
        )


def warn_if_finished(start_iter: int, max_iter: int, key: str = "SOLVER.MAX_ITER") -> None:
    """Warn if there is nothing left to train."""
    if start_iter >= max_iter:
        _logger.warning(
            f"the checkpoint has {start_iter} iterations and {key} is {max_iter}: nothing is left to "
            f"train; raise {key} to go on"
        )


def warn_if_random_and_frozen(model: nn.Module, weights: str, key: str, remedy: str) -> None:
    """Warn if a run that starts from random weights never trains some of them.

    Args:
        weights: that the run starts from; empty: random ones.
        key: what the config calls the weights.
        remedy: how to train all parameters.
    """
    frozen = [name for name, param in model.named_parameters() if not param.requires_grad]
    if frozen and not weights:
        _logger.warning(
            f"{key} is empty, and {len(frozen)} parameters such as {frozen[0]} are frozen, so that they "
            f"stay random: set {remedy}, or name weights"
        )


def warn_if_random(cfg: CfgNode) -> None:
    """Warn if a run on a labelled folder, which mostly has few images, starts from random weights."""
    if cfg.DATASETS.FOLDER and not cfg.MODEL.WEIGHTS:
        _logger.warning(
            "MODEL.WEIGHTS is '', so the run starts from random weights, which need many more images: "
            "docs/weights.md says how to get those of the MABN authors "
            "(https://github.com/megvii-model/MABN) or of torchvision"
        )


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Return the names of the parameters of each group of an optimizer."""
    names = {id(param): name for name, param in model.named_parameters()}
    return [
        [names[id(param)].removeprefix("module.") for param in group["params"]]
        for group in optimizer.param_groups
    ]


def with_current_settings(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    old_names: list[list[str]] | None,
    names: list[list[str]],
) -> dict[str, Any]:
    """Return an optimizer's state dict with its momenta and the settings that `optimizer` has.

    Args:
        optimizer: as built from the config.
        state: state dict of the optimizer that ran so far. Its groups may be others: other decays
            put parameters together otherwise.
        old_names, names: names of the parameters in each group, in `state` and in `optimizer`.
            Without old ones, as in older checkpoints, the groups must be the same.
    Raises:
        CheckpointError: if it is of another kind of optimizer or of other parameters.
    """
    current = optimizer.state_dict()
    kinds = [
        "ADAMW" if any("betas" in group for group in groups) else "SGD"
        for groups in (state["param_groups"], current["param_groups"])
    ]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"the checkpoint was written with SOLVER.OPTIMIZER {kinds[0]}, not {kinds[1]}: resume with "
            "the same, or start a run of its own with MODEL.WEIGHTS"
        )
    if old_names is None:
        sizes = [[len(g["params"]) for g in groups["param_groups"]] for groups in (state, current)]
        if sizes[0] != sizes[1]:
            raise CheckpointError(
                "the optimizer's groups differ from those in the checkpoint, which does not name "
                "their parameters: resume with the rates and decays of before"
            )
        old_names = names
    # In a state dict, parameters are numbered through the groups.
    old_index = {
        name: index
        for group, group_names in zip(state["param_groups"], old_names, strict=True)
        for index, name in zip(group["params"], group_names, strict=True)
    }
    momenta = {}
    for group, group_names in zip(current["param_groups"], names, strict=True):
        for index, name in zip(group["params"], group_names, strict=True):
            if name not in old_index:
                raise CheckpointError(
                    f"the checkpoint's optimizer has no {name}: resume with the config of the run"
                )
            if old_index[name] in state["state"]:
                momenta[index] = state["state"][old_index[name]]
    groups = [
        {"initial_lr": group["lr"], **group} for group in current["param_groups"]
    ]  # a scheduler starts from initial_lr
    return {**state, "state": momenta, "param_groups": groups}


def follow_schedule(
    scheduler: Any, optimizer: torch.optim.Optimizer, before: list[dict[str, Any]]
) -> None:
    """Set the rates to those of the scheduler's iteration.

    Detectron2's LRMultiplier computes them from the config's base rates; its own state brings those of
    the checkpoint back. torch's schedulers compute a rate from the one before, and so go on from the
    rates of the checkpoint.

    Args:
        scheduler: with the state of the checkpoint.
        optimizer: with the settings of the config.
        before: groups of the optimizer in the checkpoint.
    Raises:
        CheckpointError: if the scheduler is torch's and the groups are others.
    """
    groups = optimizer.param_groups
    if isinstance(scheduler, LRMultiplier):
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, rate in zip(groups, scheduler.get_lr(), strict=True):
            group["lr"] = rate
        return
    name = type(scheduler).__name__
    if len(groups) != len(before):
        raise CheckpointError(
            f"the optimizer has {len(groups)} groups of parameters, the checkpoint {len(before)}, and "
            f"{name} goes on with their rates: resume with the rates and decays of before"
        )
    if any(o.get("initial_lr") != n.get("initial_lr") for o, n in zip(before, groups, strict=True)):
        _logger.warning(
            f"{name} goes on with the rates in the checkpoint: another SOLVER.BASE_LR has no effect"
        )
    for old, group in zip(before, groups, strict=True):
        moved = ["lr", "initial_lr"]
        if "max_momentum" in group:  # OneCycleLR and CyclicLR move the momentum too
            moved += ["momentum", "betas"]
        group.update({key: old[key] for key in moved if key in old})
