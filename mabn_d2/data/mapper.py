"""From a record to what a model takes: seeded, with the name of the image in every error."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils.file_io import PathManager
from PIL import Image

from .errors import one_line
from .seeding import seeded

MAX_BAD = 1000  # images in a row: then it is not the images


class BadImageError(RuntimeError):
    """An image that can't be read or does not fit its annotations: one line with its path."""

    def __init__(self, message: str) -> None:
        # One of a loader worker comes with the worker's traceback in front.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class NamingMapper:
    """Maps records by `mapper`; whatever it raises becomes a BadImageError with the image's path.

    Readers raise anything for a damaged file: OSError, SyntaxError, zlib's error, PIL's
    DecompressionBombError. An image that `check_header` refuses is one too.
    """

    def __init__(
        self, mapper: Callable[[dict], Any], remedy: str = "repair or remove the image"
    ) -> None:
        self.mapper, self.remedy = mapper, remedy

    def __call__(self, record: dict) -> Any:
        path = record.get("file_name")
        try:
            if path is not None:
                with PathManager.open(path, "rb") as file, Image.open(file) as image:
                    check_header(image)
            return self.mapper(record)
        except SizeMismatchError as error:
            raise BadImageError(
                f"{path} can't be used, because its annotations give another size: "
                f"{one_line(error)}: correct width and height in the annotations, {self.remedy}"
            ) from error
        except Exception as error:
            raise BadImageError(
                f"{path} can't be used ({type(error).__name__}: {one_line(error)}): {self.remedy}"
            ) from error


def check_header(image: Image.Image) -> None:
    """Refuse an image that Detectron2 would read without an error, and wrongly; needs its header only.

    Raises:
        ValueError: for more than 8 bits a channel in one channel, which Detectron2 would cut off at
            255, and see white; for a TIFF that Pillow turns while it loads it, and Detectron2 again.
    """
    if image.mode[0] in "IF":
        raise ValueError(f"mode {image.mode}, which needs converting to 8 bits a channel")
    if image.format == "TIFF" and exif_orientation(image) in range(2, 9):
        raise ValueError(
            "a TIFF with the tag Orientation, which would be turned twice: save it upright, without "
            "the tag"
        )


def exif_orientation(image: Image.Image) -> int | None:
    """Return the EXIF tag Orientation; a damaged EXIF has none, as for Detectron2."""
    try:
        return image.getexif().get(274)
    except Exception:
        return None


class SeededDataset(torch.utils.data.Dataset):
    """Maps records by `mapper`, under a seed that comes with the index.

    Args:
        mapper: raises BadImageError for a record that can't be used.
        skip_bad: put the next record that can be used in the place of one that can't, and name the
            latter in the key `bad_images` of the result; if False, it is an error.
    """

    def __init__(
        self, records: Sequence[dict], mapper: Callable[[dict], Any], skip_bad: bool = False
    ) -> None:
        self.records, self.mapper, self.skip_bad = records, mapper, skip_bad

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, seed = key
        bad: list[str | None] = []
        while len(bad) < min(len(self.records), MAX_BAD):
            record = self.records[(index + len(bad)) % len(self.records)]
            try:
                with seeded(seed):
                    mapped = self.mapper(record)
            except BadImageError as error:
                if not self.skip_bad:
                    raise
                logging.getLogger(__name__).warning(f"skipped: {error}")
                bad.append(record.get("file_name"))
                last = error
            else:
                if bad:
                    mapped["bad_images"] = bad
                return mapped
        raise BadImageError(f"none of {len(bad)} images can be used; the last: {last}") from last

    def __len__(self) -> int:
        return len(self.records)
