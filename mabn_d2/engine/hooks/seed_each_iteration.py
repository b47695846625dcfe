"""Random draws that depend on the seed and the iteration alone."""

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from ...data.seeding import mix


class SeedEachIteration(HookBase):
    """Seeds all generators before every iteration, so that a resumed run draws what the straight
    one drew (samples of anchors and RoIs, dropout)."""

    def __init__(self, seed):
        self.seed = seed

    def before_step(self):
        seed_all_rng(mix(self.seed, comm.get_rank(), self.trainer.iter))
