"""Folders of images for classification: transforms, bad files, batches that resume exactly."""

import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ..data.seeding import mix
from ..data.workers import end_with_parent


class ImagesError(ValueError):
    """One line that names the folder or file, what is wrong and what to do."""

    def __init__(self, message):
        # A loader process hands on its whole traceback, which ends with the line.
        super().__init__(message.strip().rpartition("ImagesError: ")[2])


def read_image(path):
    """Return the file as a PIL image in RGB; levels of 16 bits are scaled to 8, not clipped."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


def train_transform(size, augment=True):
    """Return PIL image -> (3, size, size) uint8: random crop and flip, or only resized."""
    random = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    return v2.Compose([*(random if augment else [v2.Resize((size, size))]), v2.PILToTensor()])


def val_transform(size, resize):
    """Return PIL image -> (3, size, size) uint8: the shorter side to `resize`, its centre."""
    return v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])


class Images(torch.utils.data.Dataset):
    """The images of `folder`/<class>/*, under keys of (index, seed).

    Args:
        transform: PIL image -> (3, H, W) uint8; torch's random numbers in it come from the key's seed.
        bad: for files that can't be decoded; "error"; "next", the next image that can be takes its
            place; or "drop", the batch has one image less.

    Raises:
        ImagesError: for a folder that is missing or has no classes, or a class without images.
    """

    def __init__(self, folder, transform, bad):
        if not Path(folder).is_dir():
            raise ImagesError(f"there is no folder {folder}: --data needs train/ and val/")
        try:
            self.images = ImageFolder(folder)
        except FileNotFoundError as error:
            raise ImagesError(f"{folder}: {error}: it needs <class>/<image> in it") from error
        self.transform, self.bad = transform, bad

    @property
    def classes(self):
        return self.images.classes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        """Return (image or None, label, paths of bad files, seconds it took)."""
        index, seed = key
        start, bad = time.perf_counter(), []
        while len(bad) < len(self):
            path, label = self.images.samples[(index + len(bad)) % len(self)]
            try:
                image = read_image(path)
            except Exception as error:  # damaged files make PIL raise anything
                if self.bad == "error":
                    reason = " ".join(str(error).split()) or type(error).__name__
                    raise ImagesError(
                        f"{path} can't be read ({reason}): mend or remove it"
                    ) from error
                bad.append(path)
                if self.bad == "drop":
                    return None, label, bad, time.perf_counter() - start
            else:
                # torchvision's transforms draw from this generator alone.
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(seed)
                    return self.transform(image), label, bad, time.perf_counter() - start
        raise ImagesError(f"none of the {len(self)} images of {self.images.root} can be read")


def collate(samples):
    """Return images (N, 3, H, W) uint8, labels (N,), paths of bad files, the images' seconds."""
    good = [(image, label) for image, label, *_ in samples if image is not None]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0, 3, 1, 1)
    labels = torch.tensor([label for _, label in good])
    return images, labels, sum((s[2] for s in samples), []), sum(s[3] for s in samples)


class ShuffledBatches:
    """Endless batches of (index, seed), whose content depends on seed and iteration alone.

    Each pass over the data is shuffled anew; a batch may reach into the next pass. Over all ranks
    every image comes once a pass.

    Args:
        length: images of the dataset.
        batch_size: images of this rank in one iteration.
        start: the first iteration.
    """

    def __init__(self, length, batch_size, seed, rank=0, world_size=1, start=0):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self):
        iteration, order, shuffled = self.start, None, None
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


def build_train_loader(images, batch_size, seed, start=0, workers=0, rank=0, world_size=1):
    """Return an endless loader of what `collate` returns, from iteration `start` on."""
    return torch.utils.data.DataLoader(
        images,
        batch_sampler=ShuffledBatches(len(images), batch_size, seed, rank, world_size, start),
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=end_with_parent,
        pin_memory=torch.cuda.is_available(),
        # Its own, for the workers' seeds: starting them must not draw from the model's.
        generator=torch.Generator().manual_seed(seed),
    )


def build_val_loader(images, batch_size, workers=0, rank=0, world_size=1):
    """Return a loader of this rank's share of all images: each belongs to exactly one rank."""
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


def check_classes(train, val):
    """Raise ImagesError if both Images have not the same classes."""
    for first, second in ((train, val), (val, train)):
        missing = sorted(set(first.classes) - set(second.classes))
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ImagesError(
                f"{second.images.root} lacks {len(missing)} classes of {first.images.root} "
                f"({shown}): both need the same class folders"
            )
