import itertools

import pytest
import torch

from mabn_d2.data.batches import TrainingBatches
from mabn_d2.data.loader import build_train_loader
from mabn_d2.data.seeding import seeded


def batches(loader, n):
    return [
        [(d["file_name"], d["image"].sum().item(), d["image"].shape) for d in batch]
        for batch in itertools.islice(loader, n)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_any_start_and_any_number_of_workers(digits_cfg, workers):
    digits_cfg.INPUT.RANDOM_FLIP = "horizontal"
    digits_cfg.INPUT.MIN_SIZE_TRAIN = (96, 112, 128, 144)  # augmentation draws one
    straight = batches(build_train_loader(digits_cfg), 20)
    assert len({shape for batch in straight for _, _, shape in batch}) > 1
    digits_cfg.DATALOADER.NUM_WORKERS = workers
    loader = build_train_loader(digits_cfg)
    torch.rand(3)  # the state of the generators is of no account
    loader.batch_sampler.start = 13
    assert batches(loader, 7) == straight[13:]
    # 24 images: each is seen once in 12 batches of 2
    assert len({name for batch in straight[:12] for name, *_ in batch}) == 24


def test_another_seed_is_another_order(digits_cfg):
    first = batches(build_train_loader(digits_cfg), 12)
    digits_cfg.SEED = 1
    assert batches(build_train_loader(digits_cfg), 12) != first


def test_aspect_ratios_are_not_mixed():
    shapes = [(200, 100) if i % 3 else (100, 200) for i in range(30)]
    grouped = TrainingBatches(shapes, itertools.cycle(range(30)), 2, True, 0)
    for batch in itertools.islice(grouped, 40):
        (i, _), (j, _) = batch
        assert shapes[i] == shapes[j]
    mixed = TrainingBatches(shapes, range(30), 2, False, 0)
    assert [[i for i, _ in batch] for batch in mixed] == [[i, i + 1] for i in range(0, 30, 2)]


def test_repeat_factor_sampler(digits_cfg):
    digits_cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    digits_cfg.DATALOADER.REPEAT_THRESHOLD = 1.0
    loader = build_train_loader(digits_cfg)
    straight = batches(loader, 6)
    loader.batch_sampler.start = 4
    assert batches(loader, 2) == straight[4:]


def test_bad_settings(digits_cfg):
    digits_cfg.DATALOADER.SAMPLER_TRAIN = "Sampler"
    with pytest.raises(ValueError, match="SAMPLER_TRAIN is 'Sampler'"):
        build_train_loader(digits_cfg)
    digits_cfg.SOLVER.IMS_PER_BATCH = 0
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH \(0\)"):
        build_train_loader(digits_cfg)


def test_seeded_restores_the_generators():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(7):
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)
