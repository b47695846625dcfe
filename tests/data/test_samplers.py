"""Detectron2's training samplers: what they draw, and that a resumed run draws the same."""

import json

import pytest
from detectron2.data import DatasetCatalog

from commands import run_support
from mabn_d2.data import DataError
from mabn_d2.data.loader import build_train_loader


@pytest.fixture
def two_sets(digits_cfg):
    """Split the 24 small scenes into first_half and second_half."""
    records = DatasetCatalog.get("small_scenes_train")
    DatasetCatalog.register("first_half", lambda: records[:12])
    DatasetCatalog.register("second_half", lambda: records[12:])
    digits_cfg.DATASETS.TRAIN = ("first_half", "second_half")
    yield digits_cfg
    DatasetCatalog.remove("first_half")
    DatasetCatalog.remove("second_half")


def indices(cfg, count, start=0):
    """Return the indices of `count` images that are drawn from iteration `start` on."""
    loader = build_train_loader(cfg)
    loader.batch_sampler.start = start
    batches = zip(range(count // 2), loader.batch_sampler, strict=False)
    return [index for _, batch in batches for index, _ in batch]


@pytest.mark.parametrize(
    "name",
    ["RandomSubset", "Weighted", "WeightedCategory", "RepeatFactor"],
)
def test_a_resumed_run_draws_the_same(name, two_sets):
    two_sets.DATALOADER.SAMPLER_TRAIN = f"{name}TrainingSampler"
    two_sets.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    two_sets.DATALOADER.REPEAT_THRESHOLD = 0.5
    two_sets.DATASETS.TRAIN_REPEAT_FACTOR = [["second_half", 3.0]]
    straight = indices(two_sets, 60)
    assert indices(two_sets, 20, start=20) == straight[40:]
    two_sets.SEED = 5
    assert indices(two_sets, 60) != straight


def test_random_subset(two_sets):
    two_sets.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    two_sets.DATALOADER.RANDOM_SUBSET_RATIO = 0.25
    drawn = indices(two_sets, 48)
    assert len(set(drawn)) == 6 and all(drawn.count(i) == 8 for i in set(drawn))
    two_sets.DATALOADER.RANDOM_SUBSET_RATIO = 0.01
    with pytest.raises(DataError, match="RANDOM_SUBSET_RATIO is 0.01, which is no image of 24"):
        indices(two_sets, 2)


def test_weights_of_sets(two_sets):
    two_sets.DATALOADER.SAMPLER_TRAIN = "WeightedTrainingSampler"
    two_sets.DATASETS.TRAIN_REPEAT_FACTOR = [["second_half", 3.0]]
    drawn = indices(two_sets, 48)  # an epoch: 12 images once, 12 images three times
    assert [drawn.count(i) for i in range(24)] == [1] * 12 + [3] * 12


def test_weights_of_sets_and_classes(two_sets):
    two_sets.DATALOADER.SAMPLER_TRAIN = "WeightedCategoryTrainingSampler"
    two_sets.DATALOADER.REPEAT_THRESHOLD = 0.0  # no class is rare
    two_sets.DATASETS.TRAIN_REPEAT_FACTOR = [["first_half", 2.0]]
    drawn = indices(two_sets, 36)
    assert [drawn.count(i) for i in range(24)] == [2] * 12 + [1] * 12


def test_two_processes(two_sets, tmp_path):
    """Together they draw what one process draws, and train on it."""
    names = [f"{name}TrainingSampler" for name in ("", "RandomSubset", "Weighted", "RepeatFactor")]
    done = run_support("sampler_ranks.py", tmp_path, *names)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["iterations"] for rank in ranks] == [2, 2]
    two_sets.DATALOADER.RANDOM_SUBSET_RATIO = two_sets.DATALOADER.REPEAT_THRESHOLD = 0.5
    two_sets.DATASETS.TRAIN_REPEAT_FACTOR = [["second_half", 3.0]]
    for name in names:
        two_sets.DATALOADER.SAMPLER_TRAIN = name
        of_ranks = [rank["drawn"][name] for rank in ranks]
        together = [index for pair in zip(*of_ranks, strict=True) for index in pair]
        assert together == indices(two_sets, len(together)), name
    weighted = [i for rank in ranks for i in rank["drawn"]["WeightedTrainingSampler"]]
    assert [weighted.count(i) for i in range(24)] == [1] * 12 + [3] * 12  # an epoch
