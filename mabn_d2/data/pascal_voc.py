"""Says why Detectron2's loader fails on files of Pascal VOC; its own errors name no file."""

from pathlib import Path
from xml.etree import ElementTree

from detectron2.data import Metadata


def find_problem(metadata: Metadata) -> str | None:
    """Return what is wrong and the remedy, or None if it is not known or the dataset is another one.

    Args:
        metadata: as `register_pascal_voc` sets it.
    """
    folder, split = metadata.get("dirname"), metadata.get("split")
    if folder is None or split is None:
        return None
    names = Path(folder, "ImageSets", "Main", f"{split}.txt")
    if not names.is_file():
        return None
    lines = [line.split() for line in names.read_text().splitlines() if line.strip()]
    if len(lines) == 1:
        return f"{names} names one image, and the loader of Detectron2 needs two: add one"
    for line in lines:
        if len(line) > 1:
            return (
                f"{names} has the line {' '.join(line)!r}, as lists of one class have: leave the name "
                "of the image on each line only"
            )
    for (image,) in lines:
        file = Path(folder, "Annotations", f"{image}.xml")
        try:
            classes = [o.findtext("name") for o in ElementTree.parse(file).iter("object")]
        except (OSError, ElementTree.ParseError) as error:
            return f"{file} can't be read ({error}): repair it, or remove {image} from {names}"
        for name in classes:
            if name not in metadata.thing_classes:
                known = ", ".join(metadata.thing_classes)
                return (
                    f"{file} has an object of the class {name!r}, which is none of {known}: correct it, "
                    "or register the dataset with this class"
                )
    return None
