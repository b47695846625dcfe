"""Seeds that depend on nothing but the numbers they are made of."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of random, numpy and torch (CPU), and restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        # Not torch.manual_seed: where CUDA is not started yet, that keeps a stack trace a call for it.
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def mix(*numbers: int) -> int:
    """Return a 32-bit seed made of non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
