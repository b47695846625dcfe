"""Digit scenes: a COCO instance-segmentation dataset made of real images in a few seconds.

Handwritten digits (scikit-learn's `load_digits`, 1,797 of 8x8 pixels) are enlarged, rotated,
coloured and blended on crops of its two sample photos. Later digits hide parts of earlier ones;
masks are the visible parts. Train and val share no digit and no photo column.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

VERSION = 1  # to be raised whenever the same parameters give other files
SPLITS = ("train", "val")
CLASSES = tuple("0123456789")
NUM_DIGITS, VAL_DIGITS = 1797, 360  # of load_digits
VAL_COLUMNS = 192  # the right end of each photo, 640 columns wide
MAX_TRIES = 500  # placements tried in one scene


@dataclass(frozen=True)
class SceneParams:
    """What the dataset depends on. Ranges include both ends; lengths in pixels, levels of 0-255."""

    seed: int = 0
    num_train: int = 1200  # images
    num_val: int = 200
    image_size: int = 144  # height and width
    num_digits: tuple[int, int] = (2, 5)  # in one image
    digit_size: tuple[float, float] = (24.0, 56.0)  # side of the enlarged 8x8 square
    max_rotation: float = 15.0  # degrees, either way
    opacity: tuple[float, float] = (0.8, 1.0)
    min_visible: float = 0.7  # share of every digit's mask that later digits leave
    min_contrast: float = 40.0  # levels between colour and background, mean of the channels
    noise_sigma: float = 6.0  # levels
    light_sigma: float = 0.0  # standard deviation of the log of the image's gain
    cast_sigma: float = 0.0  # the same of each channel's gain: a colour cast
    jpeg_quality: int = 95

    def __post_init__(self) -> None:
        if not self.digit_size[1] <= self.image_size <= VAL_COLUMNS:
            raise ValueError(
                f"image_size is {self.image_size}, which must be at least the largest digit_size "
                f"({self.digit_size[1]}) and at most {VAL_COLUMNS}, the photo columns kept for val"
            )


# Small images under light that differs from one to the next: what makes small batches hard to
# normalize, as images of the world do. The dataset digit_scenes_lit.
LIT_SCENES = SceneParams(
    num_train=2400,
    image_size=96,
    num_digits=(1, 3),
    digit_size=(18.0, 40.0),
    light_sigma=0.2,
    cast_sigma=0.1,
)


class SceneSources(NamedTuple):
    """What the scenes of one split are made of."""

    digits: np.ndarray  # (N, 8, 8) float32 in [0, 1]
    labels: np.ndarray  # (N,) 0-9
    indices: np.ndarray  # (N,) positions in load_digits
    photos: list  # of (H, W, 3) uint8, RGB


class Scene(NamedTuple):
    """One image and its K digits, the lowest first."""

    image: np.ndarray  # (S, S, 3) uint8, RGB
    masks: np.ndarray  # (K, S, S) bool: what can be seen of each digit
    visible: np.ndarray  # (K,) the share of each digit that can be seen
    chosen: np.ndarray  # (K,) positions in the arrays of SceneSources


def split_digits(seed: int = 0) -> dict[str, np.ndarray]:
    """Return {"train": (1437,), "val": (360,)}: disjoint positions in `load_digits`."""
    order = np.random.default_rng(seed).permutation(NUM_DIGITS)
    return {"train": np.sort(order[VAL_DIGITS:]), "val": np.sort(order[:VAL_DIGITS])}


@contextmanager
def named_extra() -> Iterator[None]:
    """Name the extra whose packages make the data in an ImportError."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'mabn_d2[data]'") from error


def load_sources(split: str, seed: int = 0) -> SceneSources:
    """Return the SceneSources of "train" or "val"; needs scikit-learn and pillow."""
    # Not at the top: importing scikit-learn takes seconds, and only making the dataset needs it.
    from sklearn.datasets import load_digits, load_sample_images

    data, indices = load_digits(), split_digits(seed)[split]
    columns = slice(-VAL_COLUMNS) if split == "train" else slice(-VAL_COLUMNS, None)
    return SceneSources(
        digits=(data.images[indices] / 16).astype(np.float32),
        labels=data.target[indices],
        indices=indices,
        photos=[photo[:, columns] for photo in load_sample_images().images],
    )


def render_scene(
    rng: np.random.Generator, sources: SceneSources, params: SceneParams = SceneParams()
) -> Scene:
    """Render one Scene, a function of the state of `rng` (np.random.Generator) and the arguments.

    Note that light, cast and noise are drawn at strength 0 too: scenes that differ only in these
    strengths show the same digits at the same places.

    Raises:
        ValueError: if fewer digits than `params.num_digits[0]` find a place.
    """
    import cv2

    size = params.image_size
    photo = sources.photos[rng.integers(len(sources.photos))]
    top, left = (rng.integers(length - size + 1) for length in photo.shape[:2])
    image = photo[top : top + size, left : left + size].astype(np.float32)

    masks: list[np.ndarray] = []
    areas: list[int] = []
    chosen: list[int] = []
    count = rng.integers(*params.num_digits, endpoint=True)
    for _ in range(MAX_TRIES):
        if len(masks) == count:
            break
        index = int(rng.integers(len(sources.digits)))
        side = rng.uniform(*params.digit_size)
        center = rng.uniform(side / 2, size - side / 2, 2) - 0.5
        angle = rng.uniform(-params.max_rotation, params.max_rotation)
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        opacity = rng.uniform(*params.opacity)

        # One interpolation from 8x8 to the whole canvas; the ramp makes strokes firm, edges soft.
        matrix = np.asarray(cv2.getRotationMatrix2D((3.5, 3.5), angle, side / 8), np.float64)
        matrix[:, 2] += center - 3.5
        ink = cv2.warpAffine(sources.digits[index], matrix, (size, size), flags=cv2.INTER_CUBIC)
        alpha = np.clip(2 * ink - 0.4, 0, 1)
        mask = alpha > 0.5

        left_over = [earlier & ~mask for earlier in masks]
        hides = any(m.sum() < params.min_visible * a for m, a in zip(left_over, areas))
        if hides or np.abs(image[mask].mean(0) - colour).mean() < params.min_contrast:
            continue
        image += (opacity * alpha)[..., None] * (colour - image)
        masks = [*left_over, mask]
        areas.append(int(mask.sum()))
        chosen.append(index)
    if len(masks) < params.num_digits[0]:
        raise ValueError(f"no place for {params.num_digits[0]} digits in a scene: {params}")

    light = params.light_sigma * rng.standard_normal() + params.cast_sigma * rng.standard_normal(3)
    noise = params.noise_sigma * rng.standard_normal(image.shape, np.float32)
    image = np.clip(np.rint(image * np.exp(light) + noise), 0, 255).astype(np.uint8)
    visible = np.stack(masks)
    return Scene(image, visible, visible.sum((1, 2)) / areas, np.array(chosen))


def make_digit_scenes(
    folder: str | Path, params: SceneParams = SceneParams(), progress: bool = True
) -> Path:
    """Make the dataset in `folder` unless it is there, whole or not at all, and return the path.

    Writes `{train,val}/*.jpg`, `annotations/instances_{train,val}.json` (COCO, masks as RLE; two
    keys more than COCO's: `digit`, the position in `load_digits`, and `visible`, a share) and
    `dataset.json`. An image depends on its id, split, seed and scene parameters, not on how many
    there are. Several processes may call this at once: the first to finish wins.

    Raises:
        ImportError: if a package of the extra `data` is missing.
        ValueError: if `folder` holds something else, or not all of it.
    """
    folder = Path(folder)
    # Through JSON, which turns tuples into lists, so that it equals what is read back.
    description = json.loads(json.dumps({"version": VERSION, **asdict(params)}))
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside `folder`, so that the rename stays on one file system and is atomic.
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            whole = Path(scratch) / folder.name
            (whole / "annotations").mkdir(parents=True)
            (whole / "dataset.json").write_text(json.dumps(description, indent=1))
            for split in SPLITS:
                with named_extra():
                    _write_split(whole, split, params, progress)
            try:
                os.rename(whole, folder)
            except OSError:  # another process was first, if its folder is there
                if not folder.is_dir():
                    raise

    remedy = "remove that folder, or name another root (DETECTRON2_DATASETS)"
    try:
        found = json.loads((folder / "dataset.json").read_text())
        counts = [len(os.listdir(folder / name)) for name in (*SPLITS, "annotations")]
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no whole digit-scene dataset ({error}): {remedy}") from error
    other = sorted(k for k in {*found, *description} if found.get(k) != description.get(k))
    if other:
        raise ValueError(f"{folder} holds digit scenes with other {', '.join(other)}: {remedy}")
    if counts != [params.num_train, params.num_val, len(SPLITS)]:
        raise ValueError(f"{folder} misses files: {remedy}")
    return folder


def _write_split(folder: Path, split: str, params: SceneParams, progress: bool) -> None:
    import cv2
    import pycocotools.mask as mask_util
    from tqdm import tqdm

    sources = load_sources(split, params.seed)
    (folder / split).mkdir()
    images: list[dict] = []
    annotations: list[dict] = []
    image_ids = range(1, 1 + {"train": params.num_train, "val": params.num_val}[split])
    for image_id in tqdm(image_ids, f"digit scenes, {split}", disable=not progress):
        rng = np.random.default_rng([params.seed, SPLITS.index(split), image_id])
        scene = render_scene(rng, sources, params)
        height, width = scene.image.shape[:2]
        name = f"{image_id:06d}.jpg"
        quality = [cv2.IMWRITE_JPEG_QUALITY, params.jpeg_quality]
        if not cv2.imwrite(str(folder / split / name), scene.image[..., ::-1], quality):
            raise OSError(f"can't write {folder / split / name}")
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})

        rles = mask_util.encode(np.asfortranarray(scene.masks.transpose(1, 2, 0), dtype=np.uint8))
        areas, boxes = mask_util.area(rles), mask_util.toBbox(rles)
        for k, index in enumerate(scene.chosen):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(sources.labels[index]) + 1,  # COCO counts from 1
                    "segmentation": {"size": [height, width], "counts": rles[k]["counts"].decode()},
                    "bbox": boxes[k].tolist(),
                    "area": int(areas[k]),
                    "iscrowd": 0,
                    "digit": int(sources.indices[index]),
                    "visible": round(float(scene.visible[k]), 4),
                }
            )
    content = {
        "info": {"description": f"digit scenes, {split}", "version": str(VERSION)},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def register_digit_scenes(
    root: str | None = None, name: str = "digit_scenes", params: SceneParams = SceneParams()
) -> None:
    """Register `{name}_train` and `{name}_val` in Detectron2's catalogs; again replaces them.

    Nothing is written before `DatasetCatalog.get` (a data loader) asks for the records; then the
    dataset is made in `{root}/{name}` by `make_digit_scenes`, whose errors apply. `root` is
    $DETECTRON2_DATASETS or "datasets" if None. Masks are RLE: set INPUT.MASK_FORMAT to "bitmask".
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import load_coco_json
    from detectron2.utils import comm

    root = os.getenv("DETECTRON2_DATASETS", "datasets") if root is None else root
    folder = os.path.join(os.path.expanduser(root), name)

    for split in SPLITS:
        dataset = f"{name}_{split}"
        json_file = os.path.join(folder, "annotations", f"instances_{split}.json")
        image_root = os.path.join(folder, split)

        def load(
            dataset: str = dataset, json_file: str = json_file, image_root: str = image_root
        ) -> list[dict]:
            make_digit_scenes(folder, params, progress=comm.is_main_process())
            return load_coco_json(json_file, image_root, dataset)

        if dataset in DatasetCatalog:
            DatasetCatalog.remove(dataset)
            MetadataCatalog.remove(dataset)
        DatasetCatalog.register(dataset, load)
        MetadataCatalog.get(dataset).set(
            json_file=json_file,
            image_root=image_root,
            evaluator_type="coco",
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
        )
