"""Checks the pictures of labels that a semantic head learns from or is compared with."""

import os
from collections.abc import Iterable

import numpy as np
from detectron2.data import MetadataCatalog
from PIL import Image

from .errors import DataError
from .requirements import DataRequirements, Setting

EVALUATED = ("sem_seg", "coco_panoptic_seg")  # evaluator types that read the metadata of stuff
LOOKED_AT = 100  # pictures whose labels are compared with the number of classes


def check_labels(
    wanted: DataRequirements, name: str, key: str, files: Iterable[str], evaluation: bool
) -> None:
    """Check the labels of a dataset of a model with a semantic head.

    Args:
        wanted: what the config says; without `num_stuff_classes` nothing is checked.
        name, key: of the dataset, and of the setting that names it.
        files: pictures of labels, one for each image.
        evaluation: whether the dataset is compared with.
    Raises:
        DataError: if labels are missing, or do not fit the number of classes.
    """
    setting, files = wanted.num_stuff_classes, list(files)
    metadata = MetadataCatalog.get(name)
    kind = metadata.get("evaluator_type")
    if setting is None or (evaluation and kind not in EVALUATED):
        return
    where = f"{key} names {name!r}, "
    if not files:
        raise DataError(
            f"{where}which has no semantic labels (sem_seg_file_name), and {setting.key} is of a model "
            "that learns them: name a dataset that has them, or use another model"
        )
    missing = [file for file in files if "://" not in file and not os.path.isfile(file)]
    if missing:
        raise DataError(
            f"{where}of whose {len(files)} pictures of labels {len(missing)} do not exist, the first: "
            f"{missing[0]}: add them, or leave their images out"
        )
    ignored = wanted.ignore_value
    if evaluation:
        for attribute, example in (("stuff_classes", "[...]"), ("ignore_label", "255")):
            if metadata.get(attribute) is None:
                raise DataError(
                    f"{where}which has no {attribute}: set it with "
                    f"MetadataCatalog.get({name!r}).set({attribute}={example})"
                )
        ignored = Setting("ignore_label", metadata.ignore_label)
    step = max(len(files) // LOOKED_AT, 1)
    for file in files[::step][:LOOKED_AT]:
        if "://" not in file:
            _check_picture(file, setting, ignored, where, evaluation)


def _check_picture(
    file: str, setting: Setting, ignored: Setting, where: str, evaluation: bool
) -> None:
    try:
        with Image.open(file) as picture:
            mode, channels = picture.mode, len(picture.getbands())
            if channels > 1:
                raise DataError(
                    f"{where}whose labels {file} have {channels} channels: write one number for each pixel"
                )
            stored = np.asarray(picture)
            # The training reads gray values; Detectron2's evaluator reads what is stored.
            gray = stored if evaluation or mode == "L" else np.asarray(picture.convert("L"))
    except OSError as error:
        raise DataError(f"{where}whose labels {file} can't be read ({error}): repair it") from error
    if (changed := gray != stored).any():
        first = np.argmax(changed)
        raise DataError(
            f"{where}whose labels {file} have mode {mode}: Detectron2 trains on the gray values of the "
            f"picture, {gray.flat[first]} where the label is {int(stored.flat[first])}: save the labels "
            "as 8-bit gray (mode L)"
        )
    labels = np.unique(stored)
    wrong = [n for n in labels.tolist() if not 0 <= n < setting.value and n != ignored.value]
    if wrong:
        raise DataError(
            f"{setting}, but {where}whose labels {file} have the value {wrong[0]}: use 0 to "
            f"{setting.value - 1}, {ignored.value} for pixels that do not count ({ignored.key}), or set "
            f"{setting.key}"
        )
