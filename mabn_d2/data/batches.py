"""Which images belong to an iteration."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.utils import comm

from .seeding import mix


class TrainingBatches:
    """Endless batches of (index, seed), starting at batch `start`, which may be set later.

    With `accumulation_steps` n a batch is n micro-batches, one behind the other. Micro-batch k of
    rank p has the images and seeds that rank p * n + k has in a run of n times as many processes
    without accumulation, so that both runs see the same data.

    Args:
        shapes: (width, height) of each record.
        sampler: an endless iterable of indices, the same each time it is iterated: a sampler of
            Detectron2's, which takes every n-th index, or this rank's indices themselves.
        batch_size: images in one micro-batch.
        group_by_aspect_ratio: batch wide images with wide ones, as Detectron2 does.
        seed: what the records' seeds are made of, with the position in the sampler.
        accumulation_steps: micro-batches in one batch.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        sampler: Iterable[int],
        batch_size: int,
        group_by_aspect_ratio: bool,
        seed: int,
        accumulation_steps: int = 1,
    ):
        self.shapes, self.batch_size = shapes, batch_size
        self.group_by_aspect_ratio, self.seed = group_by_aspect_ratio, seed
        self.start = 0
        first = comm.get_rank() * accumulation_steps
        self.samplers = {
            first + k: _sampler_of(sampler, first + k, accumulation_steps)
            for k in range(accumulation_steps)
        }

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        micro_batches = [self._micro_batches(*item) for item in self.samplers.items()]
        for batch in itertools.islice(zip(*micro_batches, strict=True), self.start, None):
            # The seeds are made here, not for the batches that a resumed run leaves out.
            yield [
                (index, mix(self.seed, rank, position))
                for records in batch
                for rank, position, index in (record["key"] for record in records)
            ]

    def _micro_batches(self, rank: int, sampler: Iterable[int]) -> Iterator[list[dict]]:
        drawn = (
            {"key": (rank, position, index), "width": w, "height": h}
            for position, index in enumerate(map(int, sampler))
            for w, h in [self.shapes[index] if self.group_by_aspect_ratio else (1, 1)]
        )
        return iter(AspectRatioGroupedDataset(drawn, self.batch_size))


def _sampler_of(sampler: Iterable[int], rank: int, accumulation_steps: int) -> Iterable[int]:
    """Return the sampler of one of n times as many ranks."""
    if accumulation_steps == 1:
        return sampler
    own: Any = copy.copy(sampler)
    # Detectron2's samplers read both from the process group when they are made, and take no others.
    own._rank, own._world_size = rank, comm.get_world_size() * accumulation_steps
    return own


class MicroBatches:
    """A loader's batches, cut into micro-batches: what one forward gets in training.

    Args:
        loader: yields lists of records.
        accumulation_steps: micro-batches in one batch.
    """

    def __init__(self, loader: Iterable[list], accumulation_steps: int):
        self.loader, self.accumulation_steps = loader, accumulation_steps

    def __iter__(self) -> Iterator[Sequence]:
        for batch in self.loader:
            yield from micro_batches(batch, self.accumulation_steps)


def micro_batches(batch: Sequence, accumulation_steps: int) -> list[Sequence]:
    """Cut a batch into `accumulation_steps` consecutive parts of equal size.

    Raises:
        ValueError: if the batch can't be cut into equal parts.
    """
    if accumulation_steps == 1:
        return [batch]
    size, rest = divmod(len(batch), accumulation_steps)
    if rest or not size:
        raise ValueError(
            f"a batch of {len(batch)} images can't be cut into {accumulation_steps} micro-batches of "
            "equal size: change the accumulation steps or the images of one iteration"
        )
    return [batch[k * size : (k + 1) * size] for k in range(accumulation_steps)]
