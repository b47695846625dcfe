import os

# Before torch is imported: threads that spin while they wait slow shared cores down.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch


def pytest_collection_modifyitems(config, items):
    """Leave tests marked `gpu` out, rather than report them as skipped, where there is no GPU."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
