"""What a checkpoint says about its model: the config, the classes and a digest of the images.

Stock Detectron2 ignores them. They are plain text and lists, so that reading them runs no code.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog

from ..config import add_mabn_config
from .io import CheckpointError

CONFIG, CLASSES, IMAGES = "config", "classes", "images"  # keys of a checkpoint


def describe(cfg: CfgNode) -> dict[str, Any]:
    """Return the entries for a checkpoint of a model that `cfg` builds.

    "config" is the config as YAML text; "classes" as `describe_classes` has them; "images", for a
    labelled folder, a digest of their paths in it.
    """
    images = [MetadataCatalog.get(name).get("images") for name in cfg.DATASETS.TRAIN[:1]]
    described = {IMAGES: images[0]} if cfg.DATASETS.FOLDER and images and images[0] else {}
    return {CONFIG: cfg.dump(), **describe_classes(cfg.DATASETS.TRAIN), **described}


def describe_classes(datasets: Sequence[str]) -> dict[str, Any]:
    """Return {"classes": COCO categories in the model's order} of the first of some datasets.

    Empty if there is no dataset, or if it has no list of classes.
    """
    if not datasets:
        return {}
    metadata = MetadataCatalog.get(datasets[0])
    names = metadata.get("thing_classes")
    if not names:
        return {}
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    # Ids that are no integers, which COCO results can't have, are replaced.
    id_of = {index: id for id, index in ids.items()} if all(type(i) is int for i in ids) else {}
    return {
        CLASSES: [
            {"id": id_of.get(index, index + 1), "name": str(name)}
            for index, name in enumerate(names)
        ]
    }


def classes_of(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the classes that a checkpoint names, as COCO categories; None if it names none.

    Raises:
        CheckpointError: if the entry is no such list.
    """
    classes = checkpoint.get(CLASSES)
    if classes is None:
        return None
    if not isinstance(classes, list) or not all(
        isinstance(c, dict) and type(c.get("id")) is int and isinstance(c.get("name"), str)
        for c in classes
    ):
        raise CheckpointError(
            f"the entry {CLASSES!r} of the checkpoint is no list of ids and names: remove it, or use "
            "another file"
        )
    return classes


def class_names_of(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes of a checkpoint of any program; [] if it names none."""
    try:
        return [c["name"] for c in classes_of(checkpoint) or ()]
    except CheckpointError:  # the entry of another program
        return []


def warn_of_other_classes(checkpoint: Mapping[str, Any], datasets: Sequence[str]) -> None:
    """Log a warning where weights were trained with other classes, or another order, than a dataset has.

    Args:
        checkpoint: that the weights come from.
        datasets: that the model is trained or evaluated on.
    """
    theirs = class_names_of(checkpoint)
    for dataset in datasets if theirs else ():
        ours = [c["name"] for c in describe_classes([dataset]).get(CLASSES, ())]
        if ours and ours != theirs:
            line = (
                f"{dataset} has the {len(ours)} classes {_listed(ours)}, and the weights were "
                f"trained with the {len(theirs)} classes {_listed(theirs)}"
            )
            logging.getLogger(__name__).warning(
                f"{line}: each class gets the weights of the class at its place; give the dataset "
                "the same names in the same order unless this is meant"
                if len(ours) == len(theirs)
                else f"{line}: what depends on their number starts anew"
            )


def _listed(names: Sequence[str]) -> str:
    return f"({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"


def config_of(checkpoint: Mapping[str, Any]) -> CfgNode | None:
    """Return the config that a checkpoint holds; None if it holds none.

    Keys that this version does not know are left out with a warning.

    Raises:
        CheckpointError: if the entry is no config.
    """
    text = checkpoint.get(CONFIG)
    if not isinstance(text, str):
        return None
    cfg = get_cfg()
    add_mabn_config(cfg)
    try:
        node = yaml.safe_load(text)
        if not isinstance(node, dict):
            raise ValueError(f"it is a {type(node).__name__}, no mapping")
        unknown = _drop_unknown(node, cfg)
        cfg.merge_from_other_cfg(CfgNode(node))
    except (AssertionError, KeyError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the entry {CONFIG!r} of the checkpoint is no config ({reason}): name the config file"
        ) from error
    if unknown:
        logging.getLogger(__name__).warning(
            f"config in the checkpoint: keys that are not known here: {', '.join(unknown)}"
        )
    return cfg


def _drop_unknown(node: dict[str, Any], known: CfgNode, prefix: str = "") -> list[str]:
    """Delete the keys of `node` that `known` lacks, and return them."""
    unknown = []
    for key in list(node):
        if key not in known:
            unknown.append(f"{prefix}{key}")
            del node[key]
        elif isinstance(node[key], dict) and isinstance(known[key], CfgNode):
            unknown += _drop_unknown(node[key], known[key], f"{prefix}{key}.")
    return unknown
