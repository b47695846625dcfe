"""The peculiarities of the COCO files that labelling tools export.

Each function changes the content of a sound file (`coco_datasets`) to the form of one tool, as seen in
public repositories, and returns whether the objects have masks.
"""

from coco_datasets import SIZE, rle


def roboflow(content, boxes_only=True):
    """Ids from 0, a class 0 for the whole project, `area` as a product of rounded sides."""
    content["info"] = {"year": "2026", "version": "1", "description": "Exported from roboflow.com"}
    content["licenses"] = [{"id": 1, "url": "", "name": "CC BY 4.0"}]
    for category in content["categories"]:
        category["supercategory"] = "parts"
    content["categories"].insert(0, {"id": 0, "name": "parts", "supercategory": "none"})
    _renumber_from_zero(content)
    for image in content["images"]:
        image.update(license=1, date_captured="2026-01-01T00:00:00+00:00")
    if boxes_only:
        for annotation in content["annotations"]:
            annotation["segmentation"] = []
    return not boxes_only


def roboflow_polygons(content):
    return roboflow(content, boxes_only=False)


def cvat(content):
    """`segmentation: []` for boxes, `attributes`, float areas, licenses and info of empty text."""
    content["info"] = {"contributor": "", "date_created": "", "year": ""}
    content["licenses"] = [{"name": "", "id": 0, "url": ""}]
    for image in content["images"]:
        image.update(license=0, flickr_url="", coco_url="", date_captured=0)
    for annotation in content["annotations"]:
        annotation.update(segmentation=[], attributes={"occluded": False, "rotation": 0.0})
        annotation["area"] = float(annotation["area"])
    return False


def cvat_masks(content):
    """Masks of its brush: uncompressed RLE, and iscrowd 1 for some tracks, here for none."""
    cvat(content)
    for annotation in content["annotations"]:
        annotation["segmentation"] = rle(annotation["bbox"])
    return True


def label_studio(content):
    """Ids from 0, category ids from 0, `ignore: 0`, float boxes, file names with a folder."""
    _renumber_from_zero(content)
    for category in content["categories"]:
        category["id"] -= 1
    for annotation in content["annotations"]:
        annotation["category_id"] -= 1
        annotation.update(segmentation=[], ignore=0)
        annotation["bbox"] = [v + 0.25 for v in annotation["bbox"]]
    return False


def label_studio_brush(content):
    """Polygons with collinear and repeated points."""
    label_studio(content)
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x, y, x + w, y, x + w, y + h, x + w, y + h, x, y + h]]
    return True


def datumaro(content):
    """Category names with an empty supercategory; `score` beside each object."""
    for category in content["categories"]:
        category["supercategory"] = ""
    for annotation in content["annotations"]:
        annotation.update(segmentation=[], attributes={"score": 1.0})
    return False


def sahi(content):
    """Sliced images: `segmentation: []`, boxes that end on the border, `ignore` 0."""
    for annotation in content["annotations"]:
        x, y = annotation["bbox"][:2]
        annotation.update(bbox=[x, y, SIZE - x, SIZE - y], segmentation=[], ignore=0)
    return False


def sahi_masks(content):
    """Slicing leaves parts of two points beside good ones."""
    for annotation in content["annotations"]:
        annotation["segmentation"].append([1, 1, 2, 2])
    return True


def labelme2coco(content):
    """A class `_background_` of id 0; no `licenses`."""
    content["categories"].insert(0, {"id": 0, "name": "_background_"})
    return True


def coco_annotator(content):
    """Metadata and colours beside each entry; polygons of floats; `isbbox`."""
    for image in content["images"]:
        image.update(path=f"/datasets/{image['file_name']}", annotated=True, metadata={})
    for annotation in content["annotations"]:
        annotation.update(isbbox=False, color="#f1c40f", metadata={}, creator="system")
        annotation["segmentation"] = [[v + 0.5 for v in annotation["segmentation"][0]]]
    return True


def via(content):
    """Sizes as floats, category ids as text, one polygon without a list around it, no `iscrowd`."""
    for image in content["images"]:
        image.update(width=float(SIZE), height=float(SIZE))
    for category in content["categories"]:
        category["id"] = str(category["id"])
    for annotation in content["annotations"]:
        annotation["category_id"] = str(annotation["category_id"])
        (annotation["segmentation"],) = annotation["segmentation"]
        del annotation["iscrowd"]
    return True


def supervisely(content):
    """Image and annotation ids of eight digits, `iscrowd` and `area` missing, RLE as text."""
    for image in content["images"]:
        image["id"] += 29_000_000
    for annotation in content["annotations"]:
        annotation["image_id"] += 29_000_000
        annotation["id"] += 480_000_000
        annotation["segmentation"] = rle(annotation["bbox"], counts_as_text=True)
        del annotation["iscrowd"], annotation["area"]
    return True


def fiftyone(content):
    """Ids as text, `supercategory: null`, `iscrowd` and `area` there."""
    for image in content["images"]:
        image["id"] = f"img-{image['id']}"
    for category in content["categories"]:
        category["supercategory"] = None
    for annotation in content["annotations"]:
        annotation["image_id"] = f"img-{annotation['image_id']}"
        annotation["id"] = f"ann-{annotation['id']}"
    return True


def _renumber_from_zero(content):
    for image in content["images"]:
        image["id"] -= 1
    for annotation in content["annotations"]:
        annotation["id"] -= 1
        annotation["image_id"] -= 1


TOOLS = [
    roboflow, roboflow_polygons, cvat, cvat_masks, label_studio, label_studio_brush, datumaro, sahi,
    sahi_masks, labelme2coco, coco_annotator, via, supervisely, fiftyone,
]  # fmt: skip
