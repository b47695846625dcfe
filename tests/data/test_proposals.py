"""Files of proposals are read without running their code, for training and evaluation."""

import os
import pickle

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.data.build import load_proposals_into_dataset
from detectron2.modeling import build_model

from hostile import Hostile
from mabn_d2 import CheckpointError
from mabn_d2.data import DataError
from mabn_d2.data.loader import build_test_loader, build_train_loader
from mabn_d2.data.proposals import add_proposals
from mabn_d2.engine.validation_loss import build_validation_loader, validation_losses
from mabn_d2.visualization import prediction_pictures


def write(path, records, **changes):
    rng = np.random.default_rng(0)
    content = {
        "ids": [record["image_id"] for record in records],
        "boxes": [rng.uniform(0, 100, (4, 4)).astype(np.float32) for _ in records],
        "objectness_logits": [rng.uniform(size=4).astype(np.float32) for _ in records],
        "bbox_mode": 0,
        **changes,
    }
    path.write_bytes(pickle.dumps(content))
    return str(path)


def test_same_as_detectron2(small_scenes, tmp_path):
    records = DatasetCatalog.get("small_scenes_val")
    path = write(tmp_path / "proposals.pkl", records)
    add_proposals(records, path)
    expected = load_proposals_into_dataset(DatasetCatalog.get("small_scenes_val"), path)
    for ours, theirs in zip(records, expected, strict=True):
        for key in ("proposal_boxes", "proposal_objectness_logits", "proposal_bbox_mode"):
            np.testing.assert_array_equal(ours[key], theirs[key])


@pytest.fixture
def with_proposals(digits_cfg, tmp_path):
    """The config of a model that takes its proposals from files."""
    cfg = digits_cfg
    cfg.MODEL.LOAD_PROPOSALS = True
    for split, key in (("train", "TRAIN"), ("val", "TEST")):
        records = DatasetCatalog.get(f"small_scenes_{split}")
        path = write(tmp_path / f"{split}.pkl", records)
        cfg.merge_from_list([f"DATASETS.PROPOSAL_FILES_{key}", (path,)])
    return cfg


def test_loaders(with_proposals):
    cfg = with_proposals
    for loader in (build_train_loader(cfg), build_test_loader(cfg, "small_scenes_val")):
        assert len(next(iter(loader))[0]["proposals"]) == 4


def test_what_follows_from_an_evaluation(with_proposals):
    """Validation losses and pictures have them too."""
    cfg = with_proposals
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    model = build_model(cfg)
    losses = validation_losses(model, build_validation_loader(cfg, "small_scenes_val"))
    assert "loss_cls" in losses and "loss_rpn_cls" not in losses
    assert len(list(prediction_pictures(cfg, model, 2))) == 2


def test_bad_files(small_scenes, tmp_path):
    records = DatasetCatalog.get("small_scenes_val")
    trap, path = tmp_path / "trap", tmp_path / "proposals.pkl"
    with pytest.raises(CheckpointError, match="is refused.*mkdir"):
        add_proposals(records, write(path, records, ids=Hostile(os.mkdir, str(trap))))
    assert not trap.exists()
    with pytest.raises(DataError, match="is no file of proposals.*it needs ids, boxes"):
        path.write_bytes(pickle.dumps({"boxes": []}))
        add_proposals(records, str(path))
    with pytest.raises(DataError, match="has no proposals for 1 of 6 images, such as image 1"):
        add_proposals(records, write(path, records[1:]))
