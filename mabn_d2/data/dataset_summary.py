"""What a dataset holds, in the numbers that a config is compared with."""

import os
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class DatasetSummary:
    """Counts of a dataset; an object is an annotation that is no crowd.

    Attributes:
        source: the file or the registered name, for messages.
        classes: names in the order of the model's classes; None if the dataset does not say.
        images_with_objects: those that Detectron2 keeps if FILTER_EMPTY_ANNOTATIONS is True.
        annotated: False for a file that lists images only, as COCO's test sets do.
        objects_with_area: objects whose box has an area inside the image.
        objects_with_mask, objects_with_rle, objects_with_keypoints: counts of objects.
        crowds_without_mask: count of crowd annotations.
        no_mask, no_keypoints, rle: text that names the first such object, for messages.
        keypoint_counts: how many objects have how many keypoints.
        class_ids: how many annotations have which class, for datasets without names.
        objects_per_image: how many images have how many objects, where there are any.
        files: paths of the images.
    """

    source: str
    classes: list[str] | None = None
    images: int = 0
    images_with_objects: int = 0
    annotated: bool = True
    objects: int = 0
    objects_with_area: int = 0
    crowds: int = 0
    objects_with_mask: int = 0
    objects_with_rle: int = 0
    objects_with_keypoints: int = 0
    crowds_without_mask: int = 0
    no_mask: str = ""
    no_keypoints: str = ""
    rle: str = ""
    keypoint_counts: Counter = field(default_factory=Counter)
    class_ids: Counter = field(default_factory=Counter)
    objects_per_image: Counter[int] = field(default_factory=Counter)
    files: set[str] = field(default_factory=set)


def summarize_records(
    records: list[dict], source: str, classes: list[str] | None
) -> DatasetSummary:
    """Return the DatasetSummary of records in Detectron2's format."""
    summary = DatasetSummary(source, classes, images=len(records))
    summary.annotated = any("annotations" in record for record in records)
    summary.files = {os.path.normpath(r["file_name"]) for r in records if "file_name" in r}
    for record in records:
        annotations = record.get("annotations", ())
        objects = sum(not a.get("iscrowd", 0) for a in annotations)
        summary.images_with_objects += objects > 0
        summary.objects_per_image[objects] += objects > 0
        for position, annotation in enumerate(annotations):
            name = f"annotation {position} of {record.get('file_name', record.get('image_id'))}"
            masks = annotation.get("segmentation")
            has_mask = masks is not None and len(masks) > 0
            if annotation.get("iscrowd", 0):
                summary.crowds += 1
                summary.crowds_without_mask += not has_mask
                continue
            summary.objects += 1
            summary.objects_with_area += 1  # not looked at
            summary.class_ids[annotation.get("category_id")] += 1
            summary.objects_with_mask += has_mask
            if not has_mask:
                summary.no_mask = summary.no_mask or name
            elif not isinstance(masks, list):
                summary.objects_with_rle += 1
                summary.rle = summary.rle or name
            if points := annotation.get("keypoints"):
                summary.objects_with_keypoints += 1
                summary.keypoint_counts[len(points) // 3] += 1
            else:
                summary.no_keypoints = summary.no_keypoints or name
    return summary
