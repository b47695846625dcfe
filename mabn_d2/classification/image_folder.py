"""Image folders for classification: transforms, bad files, batches that resume exactly."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from ..data.seeding import mix
from ..data.workers import end_with_parent


class ImagesError(ValueError):
    """One line that names the folder or file, what is wrong and what to do."""

    def __init__(self, message: str):
        # An error of a loader process carries its whole traceback, which ends with this line.
        super().__init__(message.strip().rpartition("ImagesError: ")[2])


def read_image(path: str | Path) -> Image.Image:
    """Return the file as a PIL image in RGB; 16 bits are scaled to 8 bits, not clipped."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


def train_transform(size: int, augment: bool = True) -> Callable:
    """Return a transform, PIL image -> (3, size, size) uint8: random crop and flip, or only resized."""
    random = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    return v2.Compose([*(random if augment else [v2.Resize((size, size))]), v2.PILToTensor()])


def val_transform(size: int, resize: int) -> Callable:
    """Return a transform, PIL image -> (3, size, size) uint8: resize the shorter side, crop the centre."""
    return v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])


class Images(torch.utils.data.Dataset):
    """The images of `folder`/<class>/*. A key is (index, seed).

    Args:
        folder: has one folder for each class.
        transform: PIL image -> (3, H, W) uint8. Its random numbers come from the key's seed.
        bad: what happens to a file that can't be decoded. "error": an ImagesError. "next": the next
            readable image replaces it. "drop": the batch has one image less.

    Attributes:
        others: paths of files that are left out, because their ending is none of torchvision's.

    Raises:
        ImagesError: if the folder is missing or has no classes, if a class has no images, or, with
            `bad` "error", for a file of another ending.
    """

    def __init__(self, folder: Path, transform: Callable, bad: str):
        if not Path(folder).is_dir():
            raise ImagesError(f"there is no folder {folder}: --data needs train/ and val/")
        self.others: list[str] = []
        try:
            self.images = ImageFolder(folder, is_valid_file=self._is_image)
        except FileNotFoundError as error:
            raise ImagesError(
                f"{folder}: {str(error).rstrip('. ')}: it needs <class>/<image> in it, of the endings "
                f"{' '.join(IMG_EXTENSIONS)}"
            ) from error
        if self.others and bad == "error":
            raise ImagesError(self.said_of_others())
        self.transform, self.bad = transform, bad

    def _is_image(self, path: str) -> bool:
        """Return whether a file counts as an image, by its ending; note it if it does not."""
        if path.lower().endswith(IMG_EXTENSIONS):
            return True
        if not Path(path).name.startswith("."):  # of the system, such as .DS_Store
            self.others.append(path)
        return False

    def said_of_others(self) -> str:
        """Return the line on the files that are left out."""
        return (
            f"{self.images.root}: {len(self.others)} files such as {self.others[0]} are left out: images "
            f"need one of the endings {' '.join(IMG_EXTENSIONS)}; rename or convert them"
        )

    @property
    def classes(self) -> list[str]:
        """The names of the classes, sorted."""
        return self.images.classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(
        self, key: tuple[int, int]
    ) -> tuple[torch.Tensor | None, int, list[str], float]:
        """Return (image or None, label, paths of bad files, seconds that reading took)."""
        index, seed = key
        start = time.perf_counter()
        bad: list[str] = []
        while len(bad) < len(self):
            path, label = self.images.samples[(index + len(bad)) % len(self)]
            try:
                image = read_image(path)
            except Exception as error:  # damaged files make PIL raise anything
                if self.bad == "error":
                    reason = " ".join(str(error).split()) or type(error).__name__
                    raise ImagesError(
                        f"{path} can't be read ({reason}): repair or remove it"
                    ) from error
                bad.append(path)
                if self.bad == "drop":
                    return None, label, bad, time.perf_counter() - start
            else:
                # torchvision's transforms use this generator only.
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(seed)
                    return self.transform(image), label, bad, time.perf_counter() - start
        raise ImagesError(f"none of the {len(self)} images of {self.images.root} can be read")


def collate(samples: Sequence[tuple]) -> tuple[torch.Tensor, torch.Tensor, list[str], float]:
    """Return images (N, 3, H, W) uint8, labels (N,), paths of bad files, seconds of reading."""
    good = [(image, label) for image, label, *_ in samples if image is not None]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0, 3, 1, 1)
    labels = torch.tensor([label for _, label in good])
    return images, labels, sum((s[2] for s in samples), []), sum(s[3] for s in samples)


class ShuffledBatches:
    """Endless batches of (index, seed) that depend on the seed and the iteration only.

    Each pass over the data has a new order. A batch may contain the end of one pass and the start of
    the next. In a pass each image occurs once over all ranks.

    Args:
        length: images of the dataset.
        batch_size: images of this rank in one iteration.
        seed: of the order and of the images' random changes.
        rank: of this process.
        world_size: number of processes.
        start: the first iteration.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        iteration, shuffled = self.start, -1  # the pass that `order` is of
        order = np.empty(0, np.int64)
        while True:
            first = (iteration * self.world_size + self.rank) * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                epoch, place = divmod(position, self.length)
                if epoch != shuffled:
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
                    shuffled = epoch
                keys.append((int(order[place]), mix(self.seed, position)))
            yield keys
            iteration += 1


def build_train_loader(
    images: Images,
    batch_size: int,
    seed: int,
    start: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> torch.utils.data.DataLoader:
    """Return an endless loader of what `collate` returns, from iteration `start` on."""
    return torch.utils.data.DataLoader(
        images,
        batch_sampler=ShuffledBatches(len(images), batch_size, seed, rank, world_size, start),
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=end_with_parent,
        pin_memory=torch.cuda.is_available(),
        # Of its own: the start of the workers must not change the model's random numbers.
        generator=torch.Generator().manual_seed(seed),
    )


def build_val_loader(
    images: Images, batch_size: int, workers: int = 0, rank: int = 0, world_size: int = 1
) -> torch.utils.data.DataLoader:
    """Return a loader of this rank's share of the images; each image belongs to one rank."""
    keys = [(index, 0) for index in range(rank, len(images), world_size)]
    return torch.utils.data.DataLoader(
        images,
        batch_sampler=[keys[i : i + batch_size] for i in range(0, len(keys), batch_size)],
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=end_with_parent,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


def check_classes(train: Images, val: Images) -> None:
    """Raise ImagesError if the classes differ."""
    for first, second in ((train, val), (val, train)):
        missing = sorted(set(first.classes) - set(second.classes))
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ImagesError(
                f"{second.images.root} lacks {len(missing)} classes of {first.images.root} "
                f"({shown}): both need the same class folders"
            )
