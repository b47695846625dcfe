"""The norms of this package: one row for each, which everything else looks up.

`get_norm`, the solver (weight decay of norms), the config check, the statistics hook, the LazyConfig
tool, the classifier and the benchmark read this table. A name in lower case is the norm's name on
command lines and the key of its settings in a LazyConfig's `train`.
"""

import ast
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from torch import nn

from ..config import AUTO
from ..layers import BatchRenorm2d, MABN2d, SplitBatchRenorm2d, SplitMABN2d
from ..layers.base import ConfigurableNorm

DETECTRON2_NUM_GROUPS = 32  # of its "GN"


@dataclass(frozen=True)
class NormType:
    """One norm.

    Attributes:
        layer: a class such as ConfigurableNorm, made as `layer(num_features, **settings)`, with a
            method `configure(**settings)`.
        settings: returns the settings of a layer that a config asks for, from its node `MODEL.<name>`.
        split_layer: makes the form for normalization batches smaller than the batch (classification)
            as `split_layer(num_features, batch_size=..., **settings)`; None if there is none.
        needs_centring: whether the convolution in front has to be centred.
        has_window: whether the layer averages over a window of `simulated_batch_size` images.
        schedule: settings that are optimizer iterations, and what happens if the training ends before.
    """

    layer: type[ConfigurableNorm]
    settings: Callable[[CfgNode], dict[str, Any]]
    split_layer: Callable[..., nn.Module] | None = None
    needs_centring: bool = False
    has_window: bool = False
    schedule: Mapping[str, str] = field(default_factory=dict)


def norm_settings(cfg: CfgNode) -> dict[str, Any]:
    """Return the arguments of MABN2d that the node MODEL.MABN asks for; defaults without a node.

    BATCH_SIZE 0 means the images of one forward: those of one GPU in one iteration, divided by
    SOLVER.ACCUMULATION_STEPS. The window is then rounded up to a whole number of forwards.
    WARMUP_ITERS and CLIP_START are in optimizer iterations (see `scale_norm_schedules`).

    Raises:
        ValueError: if BATCH_SIZE is given and does not divide SIMULATED_BATCH_SIZE.
    """
    node = cfg.MODEL.get("MABN")
    batch_size = node.BATCH_SIZE if node else 0
    simulated = node.SIMULATED_BATCH_SIZE if node else 32
    if batch_size == 0:
        if "SOLVER" not in cfg:
            raise ValueError(
                "MODEL.MABN.BATCH_SIZE is 0, the images of one GPU, but the config has no "
                "SOLVER.IMS_PER_BATCH: set BATCH_SIZE"
            )
        # At least 1: a model may be built with fewer images than workers, to be looked at.
        micro_batches = comm.get_world_size() * cfg.SOLVER.get("ACCUMULATION_STEPS", 1)
        batch_size = max(cfg.SOLVER.IMS_PER_BATCH // micro_batches, 1)
        wanted, simulated = simulated, math.ceil(simulated / batch_size) * batch_size
        if simulated != wanted:
            message = (
                f"MODEL.MABN.SIMULATED_BATCH_SIZE is {wanted}, not a multiple of the {batch_size} "
                f"images of one GPU: the window spans {simulated}"
            )
            log_first_n(logging.WARNING, message, key="message", name=__name__)
    elif simulated % batch_size:
        raise ValueError(
            f"MODEL.MABN.BATCH_SIZE ({batch_size}) does not divide MODEL.MABN."
            f"SIMULATED_BATCH_SIZE ({simulated}): change one, or set BATCH_SIZE to 0, the images "
            "of one GPU"
        )
    settings = {"batch_size": batch_size, "simulated_batch_size": simulated}
    if node:
        settings |= {
            "eps": node.EPS,
            "momentum": node.MOMENTUM,
            "clip_limit": node.CLIP_LIMIT,
        }
        # AUTO is left in a config that is not to be trained: the layer's defaults will do.
        for name in ("warmup_iters", "clip_start"):
            if node[name.upper()] != AUTO:
                settings[name] = node[name.upper()]
    return settings


def renorm_settings(cfg: CfgNode) -> dict[str, Any]:
    """Return the arguments of BatchRenorm2d from the node MODEL.BRN; none without a node."""
    return {name.lower(): value for name, value in cfg.MODEL.get("BRN", {}).items()}


NORMS: dict[str, NormType] = {
    "MABN": NormType(
        MABN2d,
        norm_settings,
        SplitMABN2d,
        needs_centring=True,
        has_window=True,
        schedule={
            "warmup_iters": "the moving averages are never used",
            "clip_start": "r stays 1, so the moving averages of the forward are never used",
        },
    ),
    "BRN": NormType(
        BatchRenorm2d,
        renorm_settings,
        SplitBatchRenorm2d,
        schedule={
            "warmup_iters": "the whole training is plain BatchNorm",
            "r_max_iter": "the bound of r never reaches R_MAX",
            "d_max_iter": "the bound of d never reaches D_MAX",
        },
    ),
}


def norm_layers() -> tuple[type[nn.Module], ...]:
    """Return the layer classes of all rows."""
    classes = (cls for row in NORMS.values() for cls in (row.layer, row.split_layer))
    return tuple(cls for cls in classes if isinstance(cls, type))


def configure_norms(model: nn.Module, cfg: CfgNode) -> None:
    """Configure the layers of every row from a config.

    The settings of a norm that the model does not have are not computed.
    """
    kinds = tuple({type(module) for module in model.modules()})
    rows = {
        name: row for name, row in NORMS.items() if any(issubclass(k, row.layer) for k in kinds)
    }
    settings = {name.lower(): row.settings(cfg) for name, row in rows.items()}
    configure_norms_by_name(model, settings)


def configure_norms_by_name(model: nn.Module, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Configure the layers of every row from {name in lower case: arguments}."""
    for name, row in NORMS.items():
        for module in model.modules():
            if isinstance(module, row.layer):
                module.configure(**settings.get(name.lower(), {}))


def parse_norm_options(options: Sequence[str]) -> dict[str, Any]:
    """Parse the values of the command line's --norm-option, each NAME=VALUE.

    Raises:
        ValueError: if an option has another form.
    """
    try:
        return {name: ast.literal_eval(value) for name, value in (o.split("=") for o in options)}
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"--norm-option takes NAME=VALUE, a number, got {options}") from error


def set_num_groups(model: nn.Module, cfg: CfgNode) -> None:
    """Give the norms that Detectron2 made for "GN" the groups of MODEL.GN.NUM_GROUPS.

    A GroupNorm with another number of groups than Detectron2's is somebody's own, and stays.

    Raises:
        ValueError: naming a norm whose channels the number does not divide.
    """
    num_groups = cfg.MODEL.get("GN", {}).get("NUM_GROUPS", DETECTRON2_NUM_GROUPS)
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm) and module.num_groups == DETECTRON2_NUM_GROUPS:
            if module.num_channels % num_groups:
                raise ValueError(
                    f"MODEL.GN.NUM_GROUPS is {num_groups}, which does not divide the "
                    f"{module.num_channels} channels of {name}: change one"
                )
            module.num_groups = num_groups


def scale_norm_schedules(model: nn.Module, accumulation_steps: int) -> None:
    """Let norms whose schedule is in optimizer iterations count micro-batches instead.

    Args:
        model: its norms as `configure` left them; those with a `scale_schedule` are changed.
        accumulation_steps: micro-batches in one optimizer iteration; with 1 nothing changes.
    """
    if accumulation_steps == 1:
        return
    for module in model.modules():
        scale_schedule = getattr(module, "scale_schedule", None)
        if scale_schedule is not None:
            scale_schedule(accumulation_steps)
