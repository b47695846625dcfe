"""Sets a config from a labelled folder: datasets, number of classes, masks."""

import contextlib
import logging
import os
from collections.abc import Collection
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from ..checkpoint import CheckpointError, read_checkpoint, weights_file
from ..checkpoint.description import IMAGES, class_names_of, classes_of, config_of
from ..config_keys import get_key
from ..data.errors import DataError
from ..data.labelled_folder import (
    PreparedFolder,
    mask_counts,
    mask_kind,
    prepare_folder,
    register_prepared,
    report,
)
from ..data.labelled_folder.layouts import WHOLE, find_layout
from ..data.labelled_folder.register import dataset_base
from .errors import ConfigError
from .resume import last_checkpoint

# Keys that a labelled folder sets; where one is given, it has to agree with the folder.
MASK_KEYS = ("MODEL.MASK_ON", "INPUT.MASK_FORMAT")
SET_BY_FOLDER = (
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "MODEL.ROI_HEADS.NUM_CLASSES",
    "MODEL.RETINANET.NUM_CLASSES",
    *MASK_KEYS,
)
# Meta-architectures of Detectron2 that have boxes only.
NO_MASKS = ("RetinaNet", "FCOS", "ProposalNetwork")

_logger = logging.getLogger(__name__)

_prepared_alone: list[tuple[tuple, PreparedFolder]] = []  # at most one


def use_folder(
    cfg: CfgNode,
    given: Collection[str] = (),
    class_names: list[str] | None = None,
    hold_out: bool = True,
    alone: bool = False,
) -> PreparedFolder:
    """Register the labelled folder DATASETS.FOLDER and set the keys of SET_BY_FOLDER, in place.

    Every process that reads the data has to call it. `log_folder` says what was found.

    Args:
        given: keys of SET_BY_FOLDER that the user gave; they are kept if they fit the data, and an
            error if they contradict it.
        class_names: the classes that a checkpoint knows, for its evaluation or its continuation.
        hold_out: take a part to validate on from the images if the folder has none; if False, the
            config is for evaluation, of the first of val, test and train that is there.
        alone: the other processes of the run do not call this now. If False, all have to, and the
            first process of each machine reads the folder.
    Raises:
        ConfigError: if a given key contradicts the data.
        BadAnnotationError: if the folder can't be used.
    """
    share = cfg.DATASETS.VAL_SHARE
    if not isinstance(share, float) or not 0 < share < 1:
        raise ConfigError(
            f"DATASETS.VAL_SHARE is {share!r}: use a number between 0 and 1, such as 0.2"
        )
    if cfg.MODEL.META_ARCHITECTURE in ("PanopticFPN", "SemanticSegmentor"):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, which needs a label for "
            "every pixel, and DATASETS.FOLDER has objects only: use a config of Mask R-CNN, Faster "
            "R-CNN or RetinaNet"
        )
    path = os.path.abspath(os.path.expanduser(cfg.DATASETS.FOLDER))
    folder = _prepare(path, share if hold_out else None, class_names, alone)
    names = register_prepared(folder)
    was_frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.DATASETS.FOLDER = path
    _set_datasets(cfg, names, given, hold_out)
    _set_classes(cfg, folder.class_names, given)
    _set_masks(cfg, folder, given)
    if was_frozen:
        cfg.freeze()
    text = report(folder, {key: get_key(cfg, key) for key in _used_keys(cfg)}, share)
    for name in names.values():
        MetadataCatalog.get(name).set(description=text)
    return folder


def with_folder(cfg: CfgNode) -> CfgNode:
    """Return `cfg`, or a copy that is set from DATASETS.FOLDER if nothing has set it from there yet.

    For a config that did not come from `setup_config`. Values that are not Detectron2's defaults count
    as given.
    """
    if not cfg.DATASETS.FOLDER:
        return cfg
    path = os.path.realpath(os.path.expanduser(cfg.DATASETS.FOLDER))
    names = [name for name in cfg.DATASETS.TRAIN if name in DatasetCatalog]
    if names and all(MetadataCatalog.get(name).get("folder") == path for name in names):
        return cfg
    default, cfg = get_cfg(), cfg.clone()
    use_folder(
        cfg,
        [
            key
            for key in SET_BY_FOLDER
            if not key.startswith("DATASETS.") and get_key(cfg, key) != get_key(default, key)
        ],
    )
    return cfg


def _prepare(
    path: str, val_share: float | None, class_names: list[str] | None, alone: bool
) -> PreparedFolder:
    """Prepare the folder in the first process of each machine, for all of its processes.

    What a call `alone` has prepared is taken by the next call of this process: the check before a run
    and the run itself read the folder once.
    """
    request = (path, val_share, class_names)
    if alone:
        prepared = prepare_folder(*request)
        _prepared_alone[:] = [(request, prepared)]
        return prepared
    own: PreparedFolder | DataError | None = None
    unexpected: Exception | None = None
    first = comm.get_rank() - comm.get_local_rank()
    if comm.get_local_rank() == 0:
        before = _prepared_alone.pop() if _prepared_alone else (None, None)
        try:
            own = before[1] if before[0] == request else prepare_folder(*request)
        except DataError as error:
            own = error
        except Exception as error:  # of any kind: the others would wait for ever
            unexpected = error
            own = DataError(f"the folder can't be read: {type(error).__name__}: {error}")
    prepared = comm.all_gather(own)
    if unexpected is not None:
        raise unexpected
    refusal = next((p for p in (prepared[first], *prepared) if isinstance(p, DataError)), None)
    if refusal is not None:
        refusal.said_elsewhere = comm.get_local_rank() > 0 or prepared[first] is not refusal
        raise refusal
    return prepared[first]


def use_folder_for(
    cfg: CfgNode,
    given: Collection[str] = (),
    resume: bool = False,
    train: bool = True,
    alone: bool = False,
) -> PreparedFolder:
    """`use_folder` for a run: the classes are those of the checkpoint that it goes on from.

    A new run from MODEL.WEIGHTS takes their order of the classes, if the names are the same.

    If the checkpoint was trained on this folder, which may have been moved, or DATASETS.TEST names it, an
    evaluation is of the images that were held out, by the DATASETS.VAL_SHARE of that training. Otherwise
    it is of the folder's own part to validate on, or of all images. Masks are evaluated if the
    checkpoint's model and the folder have them.

    Args:
        resume: the run goes on from the last checkpoint in OUTPUT_DIR, if there is one.
        train: False for an evaluation, of that checkpoint or of MODEL.WEIGHTS.
        given, alone: as for `use_folder`.
    """
    file = (resume and last_checkpoint(cfg.OUTPUT_DIR)) or ""
    if not file and train:
        return _use_in_order_of_weights(cfg, given, alone)
    file = file or weights_file(cfg.MODEL.WEIGHTS)
    checkpoint = read_checkpoint(file) if file and os.path.isfile(file) else {}
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    classes = classes_of(checkpoint)
    hold_out = train
    path = os.path.realpath(os.path.expanduser(cfg.DATASETS.FOLDER))
    trained_with = config_of(checkpoint)
    trained_on = trained_with.DATASETS.FOLDER if trained_with else ""
    trained_here = bool(trained_on) and _are_same(trained_on, path)
    if trained_with and trained_on and (train or trained_here):
        _keep_share(cfg, trained_with.DATASETS.VAL_SHARE, given, file)
    if not train:
        hold_out = trained_here or f"{dataset_base(path)}_val" in cfg.DATASETS.TEST
        if trained_with:  # as in the config.yaml of its training
            same = {key for key in MASK_KEYS if get_key(cfg, key) == get_key(trained_with, key)}
            given = set(given) - same
        if trained_with and not trained_with.MODEL.MASK_ON and "MODEL.MASK_ON" not in given:
            cfg.MODEL.MASK_ON, given = False, {*given, "MODEL.MASK_ON"}
    class_names = None if classes is None else [c["name"] for c in classes]
    folder = use_folder(cfg, given, class_names, hold_out, alone)
    moved = not hold_out and folder.images == checkpoint.get(IMAGES)
    if trained_with and moved and "DATASETS.TEST" not in given and _is_undivided(folder.parts):
        _keep_share(cfg, trained_with.DATASETS.VAL_SHARE, given, file)
        folder = use_folder(cfg, given, class_names, True, alone)
    return folder


def _are_same(path: str, other: str) -> bool:
    """Return whether two labelled folders, or files, have the same annotation files."""
    if os.path.realpath(path) == os.path.realpath(other):
        return True
    try:
        first, second = (
            {os.path.realpath(part.json_file) for part in find_layout(p).parts.values()}
            for p in (path, other)
        )
    except (DataError, OSError):  # one is there no more, or can't be used
        return False
    return first == second


def _is_undivided(parts: Collection[str]) -> bool:
    """Return whether a training on these parts of a folder would hold images out."""
    return not {"val", "test"} & set(parts)


def warn_if_trained_on(cfg: CfgNode, checkpoint: dict[str, Any]) -> None:
    """Warn of an evaluation of all images of a folder, which the weights may be trained on.

    Args:
        cfg: of the evaluation.
        checkpoint: that the weights come from.
    """
    trained_with = config_of(checkpoint)
    path = cfg.DATASETS.FOLDER
    base = dataset_base(path) if path else ""
    to_train = {f"{base}_{part}" for part in (WHOLE, "train")} & set(cfg.DATASETS.TEST)
    if trained_with and trained_with.DATASETS.FOLDER and to_train:
        _logger.warning(
            f"all images of {path} are evaluated, and the weights were trained on images of "
            f"{trained_with.DATASETS.FOLDER}: the AP is too high if some are the same (then add "
            f"DATASETS.TEST \"('{base}_val',)\", those that a training holds out)"
        )


def _use_in_order_of_weights(cfg: CfgNode, given: Collection[str], alone: bool) -> PreparedFolder:
    """`use_folder` for a new run: the heads of a class go on as those of the same class."""
    file, names = weights_file(cfg.MODEL.WEIGHTS), []
    if file and os.path.isfile(file):
        with contextlib.suppress(CheckpointError):  # the check of the weights says it
            checkpoint = read_checkpoint(file)
            names = class_names_of(checkpoint) if isinstance(checkpoint, dict) else []
    folder = use_folder(cfg, given, alone=alone)
    same = set(names) == set(folder.class_names) and len(names) == len(folder.class_names)
    if same and names != folder.class_names:
        folder = use_folder(cfg, given, names, alone=alone)
    return folder


def _keep_share(cfg: CfgNode, share: float, given: Collection[str], file: str) -> None:
    """Hold out the images that the training of a checkpoint has held out."""
    if "DATASETS.VAL_SHARE" in given and share != cfg.DATASETS.VAL_SHARE:
        raise ConfigError(
            f"DATASETS.VAL_SHARE is {cfg.DATASETS.VAL_SHARE}, but {file} was trained with {share}, so "
            "other images were held out: leave the key out"
        )
    cfg.DATASETS.VAL_SHARE = share


def log_folder(cfg: CfgNode) -> None:
    """Log, once a run, what was found in the labelled folder that `cfg` was set from."""
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    texts = [MetadataCatalog.get(name).get("description") for name in names]
    if cfg.DATASETS.FOLDER and comm.is_main_process() and any(texts):
        logging.getLogger("detectron2").info("Own images:\n" + next(filter(None, texts)))


def _set_datasets(
    cfg: CfgNode, names: dict[str, str], given: Collection[str], hold_out: bool
) -> None:
    for key in ("TRAIN", "TEST"):
        value = tuple(cfg.DATASETS[key])
        if set(value) <= set(names.values()) and value:
            continue  # the folder's own, as in the config.yaml of a run
        if key == "TEST" and "DATASETS.TEST" in given and not value and hold_out:
            continue  # no evaluation
        if f"DATASETS.{key}" in given and value:
            raise ConfigError(
                f"DATASETS.{key} is {value} and DATASETS.FOLDER is {cfg.DATASETS.FOLDER!r}: leave "
                f"one out; the folder's datasets are {', '.join(names.values())}"
            )
        parts = ("train",) if key == "TRAIN" else ("val", "test", WHOLE, "train")
        cfg.DATASETS[key] = tuple(names[part] for part in parts if part in names)[:1]
    if hold_out and set(cfg.DATASETS.TRAIN) & set(cfg.DATASETS.TEST):
        raise ConfigError(
            f"DATASETS.TRAIN is {cfg.DATASETS.TRAIN} and DATASETS.TEST {cfg.DATASETS.TEST}: a model "
            "has to be tested on images that it was not trained on"
        )


def _set_classes(cfg: CfgNode, names: list[str], given: Collection[str]) -> None:
    used = "MODEL.RETINANET" if _is_retina(cfg) else "MODEL.ROI_HEADS"
    for node in ("MODEL.ROI_HEADS", "MODEL.RETINANET"):
        key = f"{node}.NUM_CLASSES"
        value = get_key(cfg, key)
        if key in given and value != len(names) and node == used:
            raise ConfigError(
                f"{key} is {value}, but {cfg.DATASETS.FOLDER} has {len(names)} classes "
                f"({', '.join(names[:10])}{', ...' if len(names) > 10 else ''}): leave the key out, "
                f"or set it to {len(names)}"
            )
        _set(cfg, key, len(names))


def _set_masks(cfg: CfgNode, folder: PreparedFolder, given: Collection[str]) -> None:
    if cfg.MODEL.META_ARCHITECTURE in NO_MASKS:
        if "MODEL.MASK_ON" in given and cfg.MODEL.MASK_ON:
            raise ConfigError(
                f"MODEL.MASK_ON is True, but MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} has "
                "boxes only: leave the key out, or use a config of Mask R-CNN"
            )
        cfg.MODEL.MASK_ON = False
        return
    kind = mask_kind(folder.summaries)
    on, format = cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT
    if "MODEL.MASK_ON" in given and on and kind is None:
        objects, without = mask_counts(folder.summaries)
        raise ConfigError(
            f"MODEL.MASK_ON is True, but {without} of {objects} objects in {cfg.DATASETS.FOLDER} have "
            "no mask: leave the key out, or export polygons or masks of all objects"
        )
    cfg.MODEL.MASK_ON = kind is not None and (on or "MODEL.MASK_ON" not in given)
    if not cfg.MODEL.MASK_ON:
        return
    if "INPUT.MASK_FORMAT" not in given:
        cfg.INPUT.MASK_FORMAT = "polygon" if kind == "polygon" else "bitmask"
    elif kind == "rle" and format == "polygon":
        raise ConfigError(
            f"INPUT.MASK_FORMAT is {format!r}, but {cfg.DATASETS.FOLDER} has RLE masks: leave the key "
            'out, or set it to "bitmask"'
        )


def _used_keys(cfg: CfgNode) -> list[str]:
    """Return the keys of SET_BY_FOLDER that have an effect with this config."""
    unused = {f"MODEL.{'ROI_HEADS' if _is_retina(cfg) else 'RETINANET'}.NUM_CLASSES"}
    if not cfg.MODEL.MASK_ON:
        unused.add("INPUT.MASK_FORMAT")
    return [key for key in SET_BY_FOLDER if key not in unused]


def _is_retina(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE == "RetinaNet"


def _set(cfg: CfgNode, key: str, value: Any) -> None:
    *nodes, name = key.split(".")
    get_key(cfg, ".".join(nodes))[name] = value
