"""Precomputed proposals, from files that are read without running code."""

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..checkpoint.io import read_checkpoint
from .errors import DataError

# Names in files of Detectron 1.
RENAMED = {"indexes": "ids", "scores": "objectness_logits"}


def add_proposals(records: list[dict], path: str) -> None:
    """Add the proposals of a file to the records of a dataset.

    It does what `detectron2.data.load_proposals_into_dataset` does, which unpickles the file and so
    runs the code in it.

    Args:
        records: in Detectron2's format; they get `proposal_boxes`, the best first,
            `proposal_objectness_logits` and `proposal_bbox_mode`.
        path: a pickle of `ids`, `boxes` (an (N, 4) array for each image), `objectness_logits` and
            optionally `bbox_mode`.

    Raises:
        CheckpointError: if the file is damaged or would run code.
        DataError: if it is no file of proposals, or lacks images.
    """
    content = read_checkpoint(PathManager.get_local_path(path))
    try:
        content = {RENAMED.get(key, key): value for key, value in content.items()}
        index = {str(image_id): i for i, image_id in enumerate(content["ids"])}
        boxes, scores = content["boxes"], content["objectness_logits"]
        mode = BoxMode(content.get("bbox_mode", BoxMode.XYXY_ABS))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is no file of proposals ({type(error).__name__}: {error}): it needs ids, boxes "
            "and objectness_logits"
        ) from error
    missing = [r["image_id"] for r in records if str(r["image_id"]) not in index]
    if missing:
        raise DataError(
            f"{path} has no proposals for {len(missing)} of {len(records)} images, such as image "
            f"{missing[0]}: make it for these images"
        )
    for record in records:
        i = index[str(record["image_id"])]
        best_first = scores[i].argsort()[::-1]
        record["proposal_boxes"] = boxes[i][best_first]
        record["proposal_objectness_logits"] = scores[i][best_first]
        record["proposal_bbox_mode"] = mode
