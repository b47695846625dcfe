"""Which images belong to an iteration."""

import itertools

from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.utils import comm

from .seeding import mix


class TrainingBatches:
    """Endless batches of (index, seed), starting at batch `start`, which may be set later.

    Args:
        shapes: (width, height) of each record.
        sampler: an endless iterable of indices, the same each time it is iterated.
        batch_size: images of this rank in one iteration.
        group_by_aspect_ratio: batch wide images with wide ones, as Detectron2 does.
        seed: what the records' seeds are made of, with the position in the sampler.
    """

    def __init__(self, shapes, sampler, batch_size, group_by_aspect_ratio, seed):
        self.shapes, self.sampler, self.batch_size = shapes, sampler, batch_size
        self.group_by_aspect_ratio, self.seed = group_by_aspect_ratio, seed
        self.start = 0

    def __iter__(self):
        drawn = (
            {"key": (index, mix(self.seed, comm.get_rank(), position)), "width": w, "height": h}
            for position, index in enumerate(map(int, self.sampler))
            for w, h in [self.shapes[index] if self.group_by_aspect_ratio else (1, 1)]
        )
        batches = AspectRatioGroupedDataset(drawn, self.batch_size)
        for batch in itertools.islice(batches, self.start, None):
            yield [record["key"] for record in batch]
