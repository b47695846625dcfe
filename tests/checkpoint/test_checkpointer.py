"""checkpoint/checkpointer.py and checkpoint/record.py, by themselves and in the trainer."""

import os
import pickle
import resource

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from hostile import Hostile
from mabn_d2 import CheckpointError, SafeCheckpointer, convert_imagenet
from mabn_d2.checkpoint import differences, load_whole, read_checkpoint, write_checkpoint
from mabn_d2.engine import Trainer
from mabn_d2.layers import BatchRenorm2d, MABN2d
from published_resnet import PublishedResNet


def hostile_file(path, trap):
    data = {"model": {"w": Hostile(os.mkdir, str(trap))}, "__author__": "x"}
    path.write_bytes(pickle.dumps(data))


@pytest.mark.parametrize("suffix", ["pkl", "pth", "pyth"])
def test_hostile_weights_are_refused(suffix, tmp_path):
    path, trap = tmp_path / f"a.{suffix}", tmp_path / "trap"
    hostile_file(path, trap)
    checkpointer = SafeCheckpointer(nn.Linear(2, 2))
    for _ in range(2):  # a load that failed is in no one's way
        with pytest.raises(CheckpointError, match="refused.*mkdir"):
            checkpointer.load(str(path))
    assert not trap.exists()
    if suffix == "pkl":  # which is what this class is for
        with pytest.raises(ValueError, match="Unsupported type"):
            DetectionCheckpointer(nn.Linear(2, 2)).load(str(path))
        assert trap.exists()


def test_hostile_checkpoint_is_not_resumed_from(digits_cfg, tmp_path):
    os.makedirs(digits_cfg.OUTPUT_DIR)
    folder = tmp_path / "output"
    hostile_file(folder / "model_final.pkl", tmp_path / "trap")
    (folder / "last_checkpoint").write_text("model_final.pkl")
    with pytest.raises(CheckpointError, match="refused.*mkdir"):
        Trainer(digits_cfg).resume_or_load(resume=True)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("data", [[1, 2], {"model": [1]}, {"model_state": 3}])
def test_what_is_no_checkpoint(data, tmp_path):
    for suffix in ("pth", "pyth", "pkl"):
        path = tmp_path / f"a.{suffix}"
        torch.save(data, path)
        with pytest.raises((CheckpointError, ValueError)):
            SafeCheckpointer(nn.Linear(2, 2)).load(str(path))


@pytest.mark.parametrize("suffix", ["pkl", "pth", "pyth"])
def test_same_as_detectron2_where_both_may(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    source = nn.Linear(3, 4)
    state = source.state_dict()
    if suffix == "pkl":  # of Caffe2
        blobs = {"fc_w": state["weight"].numpy(), "fc_b": state["bias"].numpy(), "x_momentum": 0}
        path.write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    else:
        torch.save({"model" if suffix == "pth" else "model_state": state, "iteration": 3}, path)
    for kind in (SafeCheckpointer, DetectionCheckpointer):
        model = nn.Module()
        model.fc = nn.Linear(3, 4)
        kind(model.fc if suffix == "pth" else model).load(str(path))
        if suffix != "pyth":  # whose names match nothing here
            torch.testing.assert_close(model.fc.state_dict(), state)


def test_save_and_last_checkpoint(tmp_path):
    model, optimizer = nn.Linear(2, 2), torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
    checkpointer = SafeCheckpointer(model, str(tmp_path), optimizer=optimizer)
    for name in ("model_0.pth", "last_checkpoint"):
        (tmp_path / f".{name}.123.partial").touch()  # of a process that was killed
    checkpointer.save("model_1", iteration=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_1.pth"]
    assert (
        DetectionCheckpointer(nn.Linear(2, 2), str(tmp_path)).resume_or_load("")["iteration"] == 1
    )

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        with pytest.raises(CheckpointError, match="can't write .*model_2.pth: File too large"):
            checkpointer.save("model_2", iteration=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_1.pth"]
    assert checkpointer.get_checkpoint_file().endswith("model_1.pth")
    SafeCheckpointer(nn.Linear(2, 2), str(tmp_path)).resume_or_load("")


def test_trainer_warns_of_differences(digits_cfg, tmp_path, caplog):
    path = str(tmp_path / "R18.pth")
    write_checkpoint(convert_imagenet(PublishedResNet(18, width=8).state_dict()), path)
    digits_cfg.MODEL.WEIGHTS = path
    digits_cfg.MODEL.RESNETS.DEPTH = 18
    digits_cfg.MODEL.PIXEL_MEAN = [0.0, 0.0, 0.0]
    digits_cfg.INPUT.FORMAT = "RGB"
    trainer = Trainer(digits_cfg)
    trainer.resume_or_load(resume=False)
    warned = [r.getMessage() for r in caplog.records if "trained with" in r.getMessage()]
    assert warned == [
        "INPUT.FORMAT is RGB, the weights were trained with BGR: "
        "change the config unless this is meant"
    ]
    record = trainer.checkpointer.record
    assert record["config"]["MODEL.RESNETS.DEPTH"] == 18
    digits_cfg.INPUT.FORMAT = "BGR"
    assert differences(record, digits_cfg) == differences(None, digits_cfg) == []
    assert differences({"config": 3}, digits_cfg) == []  # of another program


def test_file_that_needs_recalibration(tmp_path, caplog):
    """As convert_weights.py writes it from BatchNorm: trained from with a warning, never evaluated.

    `load_whole` loads it to predict, to fold and to export.
    """
    path, record = tmp_path / "a.pth", {"config": {}, "recalibrate": True}
    for recalibrate in (True, False):
        write_checkpoint(
            {
                "model": nn.Linear(2, 2).state_dict(),
                "mabn_d2": record | {"recalibrate": recalibrate},
            },
            path,
        )
        checkpointer = SafeCheckpointer(nn.Linear(2, 2))
        checkpointer.load(str(path))
        assert checkpointer.needs_recalibration == recalibrate
        assert ("converted from BatchNorm" in caplog.text) == recalibrate
        caplog.clear()
        evaluated = SafeCheckpointer(nn.Linear(2, 2), complete=True)
        if recalibrate:
            with pytest.raises(CheckpointError, match="train from it before you evaluate"):
                evaluated.load(str(path))
            with pytest.raises(CheckpointError, match="train from it before you evaluate or fold"):
                load_whole(nn.Linear(2, 2), read_checkpoint(path))
        else:
            evaluated.load(str(path))
            load_whole(nn.Linear(2, 2), read_checkpoint(path))


def test_windows_that_do_not_fit_are_one_line(tmp_path, caplog):
    norms = nn.Sequential(*(MABN2d(2) for _ in range(3)))
    torch.save(norms.state_dict(), tmp_path / "a.pth")
    other = nn.Sequential(*(MABN2d(2, simulated_batch_size=8) for _ in range(3)))
    SafeCheckpointer(other).load(str(tmp_path / "a.pth"))
    (line,) = [m for m in caplog.messages if "windows start empty" in m]
    assert "0.buffer_x2 does not fit a window of 4" in line and "in 3 layers" in line
    caplog.clear()
    other[0].load_state_dict(norms[0].state_dict())
    assert "buffer_x2 does not fit a window of 4: the windows start empty" in caplog.messages


@pytest.mark.parametrize("resume", [True, False])
def test_schedules_start_with_a_new_run(tmp_path, resume):
    """Also in scripts without `Trainer`: plain loops, DefaultTrainer with DETECTRON2_ENV_MODULE."""
    model = nn.Sequential(MABN2d(2, warmup_iters=0), BatchRenorm2d(2, warmup_iters=0))
    for _ in range(3):
        model(torch.randn(2, 2, 4, 4)).sum().backward()
    checkpointer = SafeCheckpointer(model, str(tmp_path))
    checkpointer.save("model")
    if not resume:
        (tmp_path / "last_checkpoint").unlink()
    checkpointer.resume_or_load(str(tmp_path / "model.pth"), resume=resume)
    counters = (model[0].iters.item(), model[1].num_batches_tracked.item())
    assert counters == ((3, 3) if resume else (0, 0))
    assert not model[0].running_var.eq(1).any()
