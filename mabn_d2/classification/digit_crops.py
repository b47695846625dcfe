"""Digit crops: a classification dataset of real images that is made in seconds, as ImageFolder's layout.

Each image is a scene of `digit_scenes.py` with one handwritten digit, enlarged, rotated and coloured, on
a crop of a photo. Light and colour cast differ from image to image, so the statistics of few images are
noisy. Train and val share no digit and no photo column.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..data.digit_scenes import SPLITS, SceneParams, load_sources, named_extra, render_scene

VERSION = 1  # raise it if the same parameters give other files


@dataclass(frozen=True)
class CropParams(SceneParams):
    """What the dataset depends on, as in SceneParams."""

    num_train: int = 4800
    num_val: int = 1500
    image_size: int = 32
    num_digits: tuple[int, int] = (1, 1)
    digit_size: tuple[float, float] = (16.0, 28.0)
    light_sigma: float = 0.2
    cast_sigma: float = 0.1


def make_digit_crops(folder: str | Path, params: CropParams = CropParams()) -> Path:
    """Make the dataset in `folder` if it is missing, whole or not at all, and return the path.

    Writes `{train,val}/{0-9}/*.png` and `dataset.json`. An image depends on its number, split, seed
    and parameters, not on how many there are.

    Raises:
        ImportError: if a package of the extra `data` is missing.
        ValueError: if `folder` exists and is not this dataset.
    """
    folder = Path(folder)
    # Through JSON, which turns tuples into lists, so it can be compared with the file.
    description = json.loads(json.dumps({"crops": VERSION, **asdict(params)}))
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside `folder`: a rename within one file system is atomic.
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            whole = Path(scratch) / folder.name
            for split in SPLITS:
                with named_extra():
                    _write_split(whole / split, split, params)
            (whole / "dataset.json").write_text(json.dumps(description, indent=1))
            try:
                os.rename(whole, folder)
            except OSError:  # if the folder exists, another process was faster
                if not folder.is_dir():
                    raise
    try:
        found = json.loads((folder / "dataset.json").read_text())
    except (OSError, ValueError) as error:
        found = error
    if found != description:
        raise ValueError(
            f"{folder} is not this dataset of digit crops: remove it, or name another folder"
        )
    return folder


def _write_split(folder: Path, split: str, params: CropParams) -> None:
    import cv2

    sources = load_sources(split, params.seed)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
    for number in range({"train": params.num_train, "val": params.num_val}[split]):
        rng = np.random.default_rng([params.seed, SPLITS.index(split), number])
        scene = render_scene(rng, sources, params)
        path = folder / str(sources.labels[scene.chosen[0]]) / f"{number:06d}.png"
        if not cv2.imwrite(str(path), scene.image[..., ::-1]):
            raise OSError(f"can't write {path}")


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Makes the digit crops in FOLDER.")
    parser.add_argument("folder", metavar="FOLDER")
    for split in SPLITS:
        default = getattr(CropParams, f"num_{split}")
        parser.add_argument(f"--num-{split}", type=int, default=default, metavar="IMAGES")
    args = vars(parser.parse_args())
    try:
        print(make_digit_crops(args.pop("folder"), CropParams(**args)))
    except (ImportError, OSError, ValueError) as error:
        parser.exit(1, f"digit_crops: {error}\n")
