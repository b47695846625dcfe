"""Predictions on image files: pictures, COCO results and a table."""

import glob
import io
import json
import logging
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from ..checkpoint.io import atomic_file, check_writable
from ..data.labelled_folder.image_files import OTHER_SUFFIXES, SUFFIXES, image_files
from ..data.mapper import BadImageError
from ..predictor import Predictor
from ..visualization import AnyTextVisualizer, printable
from .errors import ConfigError

PICTURES, RESULTS, IMAGES = "pictures", "predictions.json", "images.json"
MIN_PICTURE = 480  # pixels of the longer side; smaller images are enlarged, or labels hide them
MAX_PICTURE = 65_500  # JPEG's limit

_logger = logging.getLogger(__name__)


class Predicted(NamedTuple):
    """What `predict_files` has written."""

    table: str
    images: int  # images with predictions, or found empty
    skipped: list[str]  # one line for each image that can't be read


def find_images(inputs: Iterable[str], output: Path | None = None) -> list[Path]:
    """Return the image files of files, folders (searched to the bottom) and globs, each once.

    Args:
        inputs: as on a command line.
        output: where predictions are written; their pictures are no input of the next call. None: nowhere.
    Raises:
        ConfigError: if there are none for one of the inputs, if one lies where pictures are written, or
            if `output` can't be written to.
    """
    found, output = [], output and output.resolve()
    pictures = output and output / PICTURES
    for name in inputs:
        path = Path(name)
        matches = [path] if path.exists() else [Path(p) for p in glob.glob(name, recursive=True)]
        files, others = [], []
        for match in sorted(matches):
            if match.is_dir():
                inside = map(Path, image_files(match))
                # What an earlier call has written is no input.
                files += sorted(p for p in inside if pictures not in p.resolve().parents)
                others += sorted(image_files(match, OTHER_SUFFIXES))
            elif match.is_file():
                files.append(match)
        left_out = (
            f"{name!r} has {len(others)} images of other formats, {printable(others[0])} for one: "
            "convert them to JPEG"
            if others
            else ""
        )
        if not files:
            raise ConfigError(
                left_out
                or f"{name!r} is no image, no folder with images ({', '.join(SUFFIXES[:3])}, ...) and "
                "no pattern that matches one: correct it"
            )
        if left_out:
            _logger.warning(f"left out: {left_out}")
        found += files
    files = list({file.resolve(): file for file in found}.values())
    if output is None or pictures is None:
        return files
    for folder in (output, pictures):
        try:
            check_writable(folder)
        except OSError as error:
            raise ConfigError(
                f"--output {folder} can't be written to ({error}): name another folder"
            ) from error
    if own := [file for file in files if pictures in file.resolve().parents]:
        raise ConfigError(
            f"--output {output} would overwrite the image {own[0]}: name another folder"
        )
    return files


def predict_files(predictor: Predictor, files: Sequence[Path], output: Path) -> Predicted:
    """Predict on image files, and write to the folder `output`:

    - `pictures/NAME.jpg`: the image with boxes, masks and class names; a second image of the same
      name gets NAME-2.jpg;
    - `predictions.json`: a list of COCO results;
    - `images.json`: a COCO file without annotations: which image an `image_id` is, which class a
      `category_id`. `COCO("images.json").loadRes("predictions.json")` reads both.

    An image that can't be read is named and left out. Nothing else is written, whatever images and
    classes are called. An error and Ctrl-C end it after both JSON files are written. If no image can be
    read, files of an earlier call stay.
    """
    pictures = output / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    metadata = Metadata(thing_classes=predictor.class_names)
    images: list[dict[str, Any]] = []
    results, skipped, seconds = [], [], []
    taken: set[str] = set()  # names of pictures
    # By the index of the class.
    objects: Counter[int] = Counter()
    with_objects: Counter[int] = Counter()
    scores: dict[int, float] = defaultdict(float)
    try:
        for path in tqdm(files, "images", unit="image"):
            try:
                image = predictor.read(path)
                start = time.perf_counter()
                instances = predictor(image)
            except BadImageError as error:
                text = str(error) if str(path) in str(error) else f"{path}: {error}"
                skipped.append(text)
                tqdm.write(f"skipped: {printable(text)}", file=sys.stderr)
                continue
            seconds.append(time.perf_counter() - start)
            if (pages := _tiff_pages(path)) > 1:
                text = f"{path}: the first of {pages} pages is used, save the others as images"
                tqdm.write(printable(text), file=sys.stderr)
            image_id, picture = len(images) + 1, _free_name(path, taken)
            _write_picture(pictures / picture, image, instances, metadata)
            height, width = image.shape[:2]
            images.append(
                {
                    "id": image_id,
                    "file_name": str(path),
                    "height": height,
                    "width": width,
                    "picture": f"{PICTURES}/{picture}",
                }
            )
            for result in instances_to_coco_json(instances, image_id):
                index = result["category_id"]
                results.append({**result, "category_id": predictor.classes[index]["id"]})
                objects[index] += 1
                scores[index] += result["score"]
            with_objects.update(set(instances.pred_classes.tolist()))
    finally:  # what was predicted is kept if a picture can't be written, and on Ctrl-C
        if images:
            _write_json(output / RESULTS, results)
            categories = [{"id": c["id"], "name": c["name"]} for c in predictor.classes]
            content = {"images": images, "annotations": [], "categories": categories}
            _write_json(output / IMAGES, content)
    rows = [
        [printable(predictor.class_names[k]), n, with_objects[k], f"{scores[k] / n:.2f}"]
        for k, n in sorted(objects.items())
    ]
    headers = ["class", "objects", "images", "mean score"]
    table = (
        tabulate(rows, headers, tablefmt="github", disable_numparse=[0])
        if rows
        else f"no object has a score of {predictor.threshold:g} or more"
    )
    if seconds:
        table += f"\n{len(images)} images, {np.median(seconds):.3f} s each (median)"
    return Predicted(table, len(images), skipped)


def _tiff_pages(path: Path) -> int:
    with Image.open(path) as image:
        try:
            return getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        except Exception:  # readers raise anything for damaged pages
            return 1


def _write_picture(path: Path, image: np.ndarray, instances: Instances, metadata: Metadata) -> None:
    longer = max(image.shape[:2])
    scale = min(max(1.0, MIN_PICTURE / longer), MAX_PICTURE / longer)
    drawn = AnyTextVisualizer(image[:, :, ::-1], metadata, scale).draw_instance_predictions(
        instances
    )
    buffer = io.BytesIO()
    Image.fromarray(drawn.get_image()).save(buffer, "JPEG", quality=92)
    with atomic_file(path) as file:
        file.write(buffer.getvalue())


def _write_json(path: Path, content: Any) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(content).encode())


def _free_name(path: Path, taken: set[str]) -> str:
    """Return a file name for the picture of an image, and enter it in `taken`.

    Names that differ in case only are one on some file systems; a name may be too long with what is
    added to it.
    """
    stem = printable(path.stem).encode()[:150].decode(errors="ignore")
    number = 1
    while True:
        name = f"{stem}-{number}.jpg" if number > 1 else f"{stem}.jpg"
        if name.casefold() not in taken:
            taken.add(name.casefold())
            return name
        number += 1
