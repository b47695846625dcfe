"""ResNets in a state dict: Detectron2's names for them, and the config that builds them."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec

from ..config import add_mabn_config
from ..modeling.backbone import BLOCKS_PER_STAGE, build_mabn_resnet_backbone
from ..modeling.norm import BUILD_ERRORS
from .io import CheckpointError

_STEM = re.compile(r"(?:stem\.)?(conv|bn)1\.(\w+)")
_BLOCK = re.compile(r"layer([1-4])\.(\d+)\.(?:(conv|bn)([123])|downsample\.([01]))\.(\w+)")
_DETECTRON2 = re.compile(r"(stem\.conv1|res[2-5]\.\d+\.(conv[123]|shortcut))(\.norm)?\.\w+")


def detectron2_name(name: str) -> str | None:
    """Return Detectron2's name of an entry of torchvision's, the published or its own ResNet.

    conv1 -> stem.conv1, layer1.0.bn2 -> res2.0.conv2.norm, layer2.0.downsample.1 ->
    res3.0.shortcut.norm; None for an entry that is none of theirs.
    """
    if found := _STEM.fullmatch(name):
        kind, entry = found.groups()
        return f"stem.conv1{'.norm' if kind == 'bn' else ''}.{entry}"
    if found := _BLOCK.fullmatch(name):
        stage, block, kind, index, downsample, entry = found.groups()
        layer = f"conv{index}" if kind else "shortcut"
        norm = ".norm" if kind == "bn" or downsample == "1" else ""
        return f"res{int(stage) + 1}.{block}.{layer}{norm}.{entry}"
    return name if _DETECTRON2.fullmatch(name) else None


def resnet_config(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return {config key: value} of the ResNet whose entries, in Detectron2's names, `state` has.

    Raises:
        CheckpointError: if it has the entries of no ResNet.
    """

    def shape(name: str) -> torch.Size:
        value = state.get(name)
        if value is None or value.dim() != 4 or 0 in value.shape:
            found = "is missing" if value is None else f"has shape {tuple(value.shape)}"
            raise CheckpointError(f"{name} {found}: this is no whole ResNet")
        return value.shape

    blocks = tuple(
        len({name.split(".")[1] for name in state if name.startswith(f"res{stage}.")})
        for stage in range(2, 6)
    )
    bottleneck = "res2.0.conv3.weight" in state
    depths = [d for d, b in BLOCKS_PER_STAGE.items() if b == blocks and (d >= 50) == bottleneck]
    if not depths:
        kind = "bottleneck" if bottleneck else "basic"
        raise CheckpointError(
            f"{blocks} {kind} blocks in the four stages are no ResNet of depth "
            f"{', '.join(map(str, BLOCKS_PER_STAGE))}"
        )
    config = {
        "MODEL.RESNETS.DEPTH": depths[0],
        "MODEL.RESNETS.STEM_OUT_CHANNELS": shape("stem.conv1.weight")[0],
        "MODEL.RESNETS.RES2_OUT_CHANNELS": shape("res2.0.conv1.weight")[0],
    }
    if bottleneck:
        width = shape("res2.0.conv2.weight")[1]
        config["MODEL.RESNETS.RES2_OUT_CHANNELS"] = shape("res2.0.conv3.weight")[0]
        config["MODEL.RESNETS.NUM_GROUPS"] = shape("res2.0.conv1.weight")[0] // width or 1
        config["MODEL.RESNETS.WIDTH_PER_GROUP"] = width
    return config


def expected_resnet(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the state dict, without data, of the MABN ResNet that {config key: value} builds.

    Raises:
        CheckpointError: if none can have such numbers of channels.
    """
    return dict(_expected_resnet(tuple(config.items())))


@lru_cache(maxsize=8)  # building takes longer than comparing
def _expected_resnet(items: tuple[tuple[str, Any], ...]) -> dict[str, torch.Tensor]:
    cfg = get_cfg()
    add_mabn_config(cfg)
    for key, value in items:
        cfg.merge_from_list([key, value])
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    with without_data("ResNet"):
        return build_mabn_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()


@contextmanager
def without_data(kind: str) -> Iterator[None]:
    """Build a model for its shapes only; CheckpointError if it can't be built with them."""
    try:
        with torch.device("meta"):
            yield
    except BUILD_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"no {kind} has the shapes of this file: {reason}") from error
