"""Faults injected into training: each must end as README's table of guarantees says."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from mabn_d2 import CheckpointError
from mabn_d2.data import BadAnnotationError, mapper
from mabn_d2.data.loader import build_test_loader, build_train_loader
from mabn_d2.data.mapper import BadImageError
from mabn_d2.engine import ConfigError, Trainer, check_config, check_data, guarded_trainer
from mabn_d2.engine.errors import DivergedError, one_line_errors
from mabn_d2.layers import MABN2d
from paths import ROOT


def inject(trainer, at, change):
    """Change the batches of the given iterations."""
    batches = iter(trainer.data_loader)

    def changed():
        for iteration, batch in enumerate(batches):
            if iteration in at:
                for record in batch:
                    change(record)
            yield batch

    trainer._trainer._data_loader_iter_obj = changed()


def poison(record):
    record["image"] = record["image"].float()
    record["image"][:, 3, 3] = torch.nan


@pytest.mark.parametrize("amp", [False, True])
def test_batches_with_nan_are_rejected(digits_cfg, amp):
    digits_cfg.DATASETS.TEST = ()
    digits_cfg.SOLVER.AMP.ENABLED = amp
    digits_cfg.SOLVER.MAX_ITER = 6
    trainer = Trainer(digits_cfg)
    inject(trainer, {2, 4}, poison)
    seen = []
    trainer._hooks[0].before_step, seed = (
        lambda: (
            seed(),
            seen.append({k: v.clone() for k, v in trainer.model.state_dict().items()}),
        ),
        trainer._hooks[0].before_step,
    )
    trainer.train()
    assert trainer._trainer.rejected == 2
    for name, value in seen[3].items():  # iteration 2 has changed nothing
        assert torch.equal(value, seen[2][name]), name
    assert not torch.equal(
        seen[4]["backbone.fpn_output2.weight"], seen[3]["backbone.fpn_output2.weight"]
    )
    assert all(v.isfinite().all() for v in trainer.model.state_dict().values())
    stem = trainer.model.backbone.bottom_up.stem.conv1.norm
    assert stem.iters == 4 and stem.rejected == 2


def test_overflow_and_a_moving_scale(digits_cfg, tmp_path):
    """Scaled gradients train as plain ones do; those that overflow are skipped, windows follow."""
    digits_cfg.DATASETS.TEST = ()
    digits_cfg.SOLVER.MAX_ITER = 6
    digits_cfg.MODEL.MABN.SIMULATED_BATCH_SIZE, digits_cfg.MODEL.MABN.WARMUP_ITERS = 4, 1
    runs = []
    for scale in (None, 2.0**10, 2.0**126):
        digits_cfg.OUTPUT_DIR = str(tmp_path / str(scale))
        torch.manual_seed(0)
        trainer = Trainer(digits_cfg)
        if scale:
            trainer._trainer.grad_scaler = torch.amp.GradScaler("cpu", scale, growth_interval=2)
        trainer.train()
        runs.append(trainer)
    plain, scaled, overflown = runs
    assert scaled._trainer.grad_scaler.get_scale() == 2.0**13 and scaled._trainer.rejected == 0
    norms = [[m for m in run.model.modules() if isinstance(m, MABN2d)] for run in runs]
    for ours, theirs in zip(*norms[:2], strict=True):
        torch.testing.assert_close(theirs.buffer_gz / 2**13, ours.buffer_gz, rtol=1e-3, atol=1e-6)
    for ours, theirs in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5)
    assert overflown._trainer.rejected > 0
    assert overflown._trainer.grad_scaler.get_scale() < 2.0**126
    assert all(v.isfinite().all() for v in overflown.model.state_dict().values())


def test_overflow_in_the_backward_only():
    """A forward in order counts, with its x2; psi, which is not finite, and the step are left out."""
    norm = MABN2d(3, simulated_batch_size=8, warmup_iters=1)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    for scale, steps in ((2.0**10, 6), (2.0**127, 1)):
        scaler = torch.amp.GradScaler("cpu", scale)
        for _ in range(steps):
            before = {name: value.clone() for name, value in norm.state_dict().items()}
            x = torch.randn(2, 3, 5, 5)
            optimizer.zero_grad()
            scaler.scale(norm(x.requires_grad_()).pow(2).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() == 2.0**126 and not x.grad.isfinite().all()
    for name in ("weight", "bias", "buffer_gz"):
        assert torch.equal(getattr(norm, name), before[name])
    assert norm.iters == 7 and norm.rejected == 0
    changed = (norm.buffer_x2 != before["buffer_x2"]).any(1)
    assert changed.sum() == 1
    torch.testing.assert_close(norm.buffer_x2[changed][0], x.detach().square().mean((0, 2, 3)))
    ema = before["running_var"].lerp(norm.buffer_x2.mean(0), 0.02)
    torch.testing.assert_close(norm.running_var, ema)


def test_nothing_but_nan_ends_the_run(digits_cfg, monkeypatch):
    digits_cfg.SOLVER.MAX_ITER = 50
    monkeypatch.setattr(guarded_trainer, "MAX_REJECTED", 3)
    trainer = Trainer(digits_cfg)
    inject(trainer, range(50), poison)
    with pytest.raises(DivergedError, match="3th batch in a row: lower SOLVER.BASE_LR"):
        trainer.train()
    assert trainer.iter == 2


def test_images_without_objects(digits_cfg):
    digits_cfg.DATASETS.TEST = ()
    trainer = Trainer(digits_cfg)
    inject(trainer, {1, 2}, lambda record: record.update(instances=record["instances"][:0]))
    trainer.train()
    assert trainer._trainer.rejected == 0
    assert all(v.isfinite().all() for v in trainer.model.state_dict().values())


def damage(kind, path):
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "text":
        path.write_text("no image")
    elif kind == "other size":
        Image.open(path).resize((40, 30)).save(path)
    elif kind == "16 bit":
        Image.new("I;16", Image.open(path).size, 40000).save(path, format="png")
    elif kind == "bomb":  # PIL refuses what is twice its limit
        Image.new("1", (20000, 20000)).save(path, format="png")


@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "other size", "16 bit", "bomb"])
def test_bad_image(digits_cfg, tmp_path, kind):
    records = [dict(r) for r in DatasetCatalog.get("small_scenes_train")]
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(open(records[0]["file_name"], "rb").read())
    records[0]["file_name"] = str(bad)
    damage(kind, bad)
    name = f"bad_{kind}"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=list("0123456789"))
    digits_cfg.DATASETS.TRAIN, digits_cfg.DATASETS.TEST = (name,), ()
    digits_cfg.SOLVER.MAX_ITER = 12  # every image once
    try:
        with pytest.raises(BadImageError, match="bad.jpg can't be used"):
            list(zip(range(12), build_train_loader(digits_cfg)))
        with pytest.raises(BadImageError, match="bad.jpg can't be used"):
            list(build_test_loader(digits_cfg, name))
        digits_cfg.DATALOADER.BAD_INPUT = "skip"
        batches = [batch for _, batch in zip(range(12), build_train_loader(digits_cfg))]
        assert [r["bad_images"] for b in batches for r in b if "bad_images" in r] == [[str(bad)]]
        if kind == "truncated":
            trainer = Trainer(digits_cfg)
            trainer.train()
            assert trainer._trainer.bad_images == 1
    finally:
        DatasetCatalog.remove(name)


def test_a_mapper_that_fails_always(digits_cfg, monkeypatch):
    """Code that is wrong is no bad image: skipping ends."""

    def broken(record):
        raise KeyError("typing error")

    monkeypatch.setattr(mapper, "MAX_BAD", 5)
    digits_cfg.DATALOADER.BAD_INPUT = "skip"
    with pytest.raises(BadImageError, match="none of 5 images can be used.*typing error"):
        next(iter(build_train_loader(digits_cfg, mapper=broken)))


def test_nothing_is_left_out_of_an_evaluation(digits_cfg, tmp_path):
    """What "skip" skips in training is an error there, before the training."""
    content = json.loads(open(MetadataCatalog.get("small_scenes_val").json_file).read())
    content["images"][2]["file_name"] = "missing.jpg"
    file = tmp_path / "val.json"
    file.write_text(json.dumps(content))
    register_coco_instances("part", {}, str(file), str(tmp_path))
    digits_cfg.DATALOADER.BAD_INPUT = "skip"
    digits_cfg.DATASETS.TEST = ("part",)
    for train in (True, False):
        with pytest.raises(BadAnnotationError, match="no file.*an evaluation leaves nothing out"):
            check_data(digits_cfg, train=train)
    DatasetCatalog.remove("part")


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK"])
def test_unusual_images_are_read(digits_cfg, tmp_path, mode):
    record = dict(DatasetCatalog.get("small_scenes_train")[0])
    image = Image.open(record["file_name"])
    record["file_name"] = str(tmp_path / ("image.jpg" if mode == "CMYK" else "image.png"))
    image.convert(mode).save(record["file_name"], quality=100)
    found = DatasetMapper(digits_cfg, False)(record)["image"].float()
    gray = mode in ("L", "LA")
    expected = torch.as_tensor(np.array(image.convert("L").convert("RGB") if gray else image))
    expected = expected.permute(2, 0, 1).flip(0).float()  # BGR
    assert (found - expected).abs().mean() < (2 if mode == "CMYK" else 1e-6)  # JPEG loses some
    assert expected.std() > 10


def test_output_folder_of_another_run(digits_cfg, tmp_path):
    digits_cfg.DATASETS.TEST = ()
    digits_cfg.SOLVER.MAX_ITER = 1
    folder = tmp_path / "output"
    Trainer(digits_cfg).train()
    (folder / "config.yaml").write_text(digits_cfg.dump())
    saved = (folder / "model_final.pth").read_bytes()
    with pytest.raises(ConfigError, match="add --resume"):
        check_config(digits_cfg)
    check_config(digits_cfg, resume=True)
    digits_cfg.SOLVER.MAX_ITER = 2
    check_config(digits_cfg, resume=True)
    digits_cfg.MODEL.FPN.OUT_CHANNELS = 32
    with pytest.raises(ConfigError, match="other MODEL.FPN.OUT_CHANNELS"):
        check_config(digits_cfg, resume=True)
    digits_cfg.OUTPUT_DIR = str(folder / "config.yaml" / "below")
    with pytest.raises(ConfigError, match="can't be written to"):
        check_config(digits_cfg)
    assert (folder / "model_final.pth").read_bytes() == saved


@pytest.mark.parametrize("resume", [False, True])
def test_checkpoints_without_last_checkpoint(digits_cfg, tmp_path, resume):
    """As they are copied from another machine: neither overwritten nor passed over."""
    folder = tmp_path / "output"
    folder.mkdir()
    for name in ("model_0000004.pth", "model_best.pth"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match="model_best.pth, but no file last_checkpoint"):
        check_config(digits_cfg, resume=resume)
    (folder / "last_checkpoint").write_text("model_0000004.pth")
    if resume:
        check_config(digits_cfg, resume=True)


def test_nothing_to_resume(digits_cfg, caplog):
    said = (
        f"OUTPUT_DIR {digits_cfg.OUTPUT_DIR!r} has no checkpoint to resume from: a new run starts"
    )
    for resume in (False, True):
        check_config(digits_cfg, resume=resume)
        assert (said in caplog.messages) == resume


@pytest.mark.parametrize("content", [b"", b"\x80\x02\xff", b"\n"])
def test_damaged_last_checkpoint(digits_cfg, tmp_path, content):
    """Empty after a power loss."""
    (tmp_path / "output").mkdir()
    (tmp_path / "output/last_checkpoint").write_bytes(content)
    with pytest.raises(ConfigError, match="last_checkpoint is damaged: write the name"):
        check_config(digits_cfg, resume=True)


@pytest.mark.parametrize("iterations", [1, 2], ids=["unfinished", "finished"])
def test_a_script_keeps_another_run(digits_cfg, iterations):
    """`Trainer.resume_or_load(resume=False)` refuses the folder of another run, and only of another."""
    digits_cfg.DATASETS.TEST = ()
    digits_cfg.SOLVER.MAX_ITER, digits_cfg.SOLVER.CHECKPOINT_PERIOD = 2, 1
    first = Trainer(digits_cfg)
    first.resume_or_load(resume=False)
    first.max_iter = iterations
    first.train()
    first.resume_or_load(resume=False)  # its own folder
    folder = Path(digits_cfg.OUTPUT_DIR)
    saved = {path.name: path.read_bytes() for path in folder.iterdir()}
    second = Trainer(digits_cfg)
    with pytest.raises(ConfigError) as error:
        second.resume_or_load(resume=False)
    assert str(error.value) == (
        f"OUTPUT_DIR {str(folder)!r} holds the checkpoints of a run: call resume_or_load(resume=True) to "
        "go on with it, or name another folder"
    )
    assert saved == {path.name: path.read_bytes() for path in folder.iterdir()}
    second.resume_or_load(resume=True)
    assert second.start_iter == iterations
    second.resume_or_load(resume=False)  # it is this run's folder now
    digits_cfg.OUTPUT_DIR += "/another"
    Trainer(digits_cfg).resume_or_load(resume=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_writes_a_checkpoint(digits_cfg, number):
    digits_cfg.DATASETS.TEST = ()
    digits_cfg.SOLVER.MAX_ITER = 100000
    before = signal.getsignal(number)
    trainer = Trainer(digits_cfg)
    threading.Timer(1.5, os.kill, (os.getpid(), number)).start()
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == 128 + number and signal.getsignal(number) is before
    resumed = Trainer(digits_cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == trainer.iter + 1
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def test_statistics_are_averaged_over_ranks_of_different_data(tmp_path):
    """Two "machines": processes of their own that meet on loopback, one without objects."""
    script = ROOT / "tests/support/two_ranks.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=250)[0] for process in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    states = [torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2)]
    saved = torch.load(tmp_path / "output" / "model_final.pth", weights_only=False)["model"]
    for name, value in states[0].items():
        assert value.isfinite().all()
        if "buffer_" in name or "iters" in name:
            continue  # each rank's own: one has rejected a batch in its layers, one by its gradients
        assert torch.equal(value, states[1][name]), name
        assert torch.equal(value, saved[name]), name
    one, two = (torch.load(tmp_path / f"variances{rank}.pth") for rank in range(2))
    assert len(one["mean"]) == 24 and not torch.equal(one["own"][0], two["own"][0])
    for k, mean in enumerate(one["mean"]):
        torch.testing.assert_close(mean, (one["own"][k] + two["own"][k]) / 2, rtol=1e-6, atol=0)
    first = "backbone.bottom_up.stem.conv1.norm.buffer_x2"
    assert not torch.equal(states[0][first], states[1][first])


def test_disk_that_takes_no_more(digits_cfg, tmp_path):
    """A limit on the size of files fails as a full disk does, in the middle of the writing."""
    digits_cfg.DATASETS.TEST = ()
    digits_cfg.SOLVER.MAX_ITER = 1
    trainer = Trainer(digits_cfg)
    trainer.train()
    folder = tmp_path / "output"
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="model_later.pth"):
            trainer.checkpointer.save("model_later")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    resumed = Trainer(digits_cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 1


def test_disk_that_takes_no_metrics(digits_cfg, tmp_path, monkeypatch):
    """What Detectron2 itself writes."""
    digits_cfg.DATASETS.TEST, digits_cfg.SOLVER.MAX_ITER = (), 5
    (tmp_path / "output").mkdir()
    (tmp_path / "output/metrics.json").symlink_to("/dev/full")
    with (
        pytest.raises(SystemExit, match="can't write: .*No space left on device: free space; a tr"),
        one_line_errors(),
    ):
        Trainer(digits_cfg).train()
    monkeypatch.setenv("MABN_D2_TRACEBACK", "1")
    with pytest.raises(OSError, match="No space left"), one_line_errors():
        open("/dev/full", "w").write("x" * 10**6)
    monkeypatch.delenv("MABN_D2_TRACEBACK")
    with pytest.raises(FileNotFoundError), one_line_errors():  # may be a fault of the program
        open(tmp_path / "no/such")
