"""LazyConfig: the same model as the YAML's, and a run of the launcher on digit scenes."""

import json
import os
import re
import signal
from functools import partial

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from commands import assert_ended, start
from inputs import training_inputs
from mabn_d2.checkpoint import write_checkpoint
from mabn_d2.engine import ConfigError, lazy_trainer
from mabn_d2.engine.hooks import LogSlowIterations
from mabn_d2.layers import BatchRenorm2d, MABN2d
from mabn_d2.solver import build_optimizer
from nested import flat
from paths import ROOT
from repository_configs import load

NAMES = ["mask_rcnn_R50_FPN_mabn_2x", "scratch_mask_rcnn_R50_FPN_mabn_2x"]


@pytest.mark.parametrize("name", NAMES)
def test_twins_have_equal_keys_and_outputs(name):
    cfg, lazy = load(f"{name}.yaml"), LazyConfig.load(str(ROOT / "configs/lazy" / f"{name}.py"))
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    lazy.model.proposal_generator.post_nms_topk = (1000, 20)
    one, two = build_model(cfg), instantiate(lazy.model)
    norms = [m for m in one.modules() if isinstance(m, MABN2d)]
    assert len(norms) == sum(isinstance(m, MABN2d) for m in two.modules()) == 69
    for norm in norms:
        norm.running_var.uniform_(0.5, 2)
    one.roi_heads.box_predictor.cls_score.weight.data.mul_(100)  # scores that differ
    assert one.state_dict().keys() == two.state_dict().keys()
    two.load_state_dict(one.state_dict())
    inputs = training_inputs()
    with torch.no_grad():
        found = [model.eval()(inputs)[0]["instances"] for model in (one, two)]
    assert len(found[0]) > 5
    for a, b in zip(*(f.get_fields().values() for f in found), strict=True):
        assert torch.equal(*(getattr(t, "tensor", t) for t in (a, b)))

    lazy.train.device = "cpu"
    fused = lazy_trainer.build_model(lazy)
    fused.load_state_dict(one.state_dict())
    losses = []
    for model in (one, fused):
        torch.manual_seed(1)  # of the samples of anchors and RoIs
        with EventStorage():
            losses.append({k: v.item() for k, v in model.train()(inputs).items()})
    assert losses[0] == losses[1]

    lazy.optimizer.params.model = two
    groups = [
        [
            {k: v for k, v in g.items() if k in ("lr", "weight_decay", "momentum")}
            | {"count": len(g["params"])}
            for g in optimizer.param_groups
        ]
        for optimizer in (build_optimizer(cfg, one), instantiate(lazy.optimizer))
    ]
    assert groups[0] == groups[1]
    scheduler = instantiate(lazy.lr_multiplier)
    assert [round(scheduler(i / 180000), 6) for i in (0, 500, 119999, 120000, 160000)] == [
        0.333333,
        1,
        1,
        0.1,
        0.01,
    ]
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER


USERS = """
from detectron2.config import LazyConfig

globals().update(LazyConfig.load({twin!r}))
model.backbone.bottom_up.stages.depth = 18
del model.backbone.bottom_up.stages.stride_in_1x1
model.backbone.out_channels = 16
model.proposal_generator.head.in_channels = 16
model.proposal_generator.post_nms_topk = (20, 10)
model.roi_heads.update(num_classes=10, batch_size_per_image=8)
for _head in (model.roi_heads.box_head, model.roi_heads.mask_head):
    _head.conv_dims = [16, 16]
    _head.input_shape.channels = 16
dataloader.train.update(total_batch_size=2, num_workers=0)
dataloader.train.dataset.names = "small_scenes_train"
dataloader.train.mapper.instance_mask_format = "bitmask"
dataloader.train.mapper.augmentations[0].short_edge_length = (64,)
dataloader.test.num_workers = 0
dataloader.test.dataset.names = "small_scenes_val"
dataloader.test.mapper.augmentations[0].short_edge_length = 64
optimizer.lr = 0.001
train.update(output_dir={output!r}, log_period=1)
train.mabn.clip_start = 100
"""


SIGNALLED = """
dataloader.train.num_workers = 2
dataloader.train.dataset.names = "digit_scenes_train"
dataloader.test.dataset.names = "digit_scenes_val"
train.max_iter = 100000
"""


@pytest.fixture
def launcher(small_scenes, tmp_path):
    """Return a function that runs the launcher on the small config, and writes to tmp_path."""
    twin, config = str(ROOT / f"configs/lazy/{NAMES[1]}.py"), tmp_path / "users.py"
    config.write_text(USERS.format(twin=twin, output=str(tmp_path)))

    def run(*arguments):
        command = ["--config-file", str(config), "--num-gpus", "0", *arguments]
        return lazy_trainer.run(default_argument_parser().parse_args(command))

    return run


def test_launcher_trains_resumes_and_evaluates(launcher, tmp_path):
    launcher("train.max_iter=2")
    launcher("--resume", "train.max_iter=3", "+train.statistics.period=1")
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    training = [line for line in lines if "total_loss" in line]
    assert [line["iteration"] for line in training] == [0, 1, 2]
    watched = {key.split("/")[1] for key in training[2] if key.startswith("statistics/")}
    assert len(watched) == 3 and "backbone.bottom_up.stem.conv1.norm" in watched
    state = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert [c["name"] for c in state["classes"]] == [str(i) for i in range(10)]
    assert state["iteration"] == 2
    assert state["model"]["backbone.bottom_up.stem.conv1.norm.iters"].item() == 3
    of_training = (tmp_path / "config.yaml").read_text()
    results = launcher("--resume", "--eval-only", "train.log_period=7")
    assert results["segm"]["AP"] == pytest.approx(lines[-1]["segm/AP"])
    assert (tmp_path / "config.yaml").read_text() == of_training
    assert "log_period: 7" in (tmp_path / "evaluation/config.yaml").read_text()


def test_converted_batch_norm_is_recalibrated(launcher, tmp_path):
    launcher("train.max_iter=1", "train.eval_period=0")
    state = torch.load(tmp_path / "model_final.pth", weights_only=False)["model"]
    for recalibrate in (True, False):
        file, output = tmp_path / "converted.pth", tmp_path / f"output_{recalibrate}"
        record = {"mabn_d2": {"recalibrate": True}} if recalibrate else {}
        write_checkpoint({"model": state, **record}, file)
        options = (f"train.init_checkpoint={file}", f"train.output_dir={output}")
        launcher("train.max_iter=1", "train.eval_period=0", *options)
        assert ("recalibrating the" in (output / "log.txt").read_text()) == recalibrate
        final = torch.load(output / "model_final.pth", weights_only=False)["model"]
        # A converted file keeps its counter, weights of another run do not.
        assert final["backbone.bottom_up.stem.conv1.norm.iters"] == 1 + recalibrate


def test_launcher_accumulates_gradients(launcher, tmp_path, monkeypatch):
    run = partial(launcher, "train.max_iter=2")
    for images, steps in ((4, 0), (4, 3), (4, 8)):
        message = "train.accumulation_steps"
        with pytest.raises(SystemExit, match=message):
            run(f"+train.accumulation_steps={steps}", f"dataloader.train.total_batch_size={images}")
    # Each iteration is slow then; the hook of the period logs the last one.
    monkeypatch.setattr(lazy_trainer, "LogSlowIterations", partial(LogSlowIterations, seconds=0.0))
    run("+train.accumulation_steps=2", "dataloader.train.total_batch_size=4", "train.eval_period=0",
        "train.log_period=20")  # fmt: skip
    logged = re.findall(r"iter: (\d+) +total_loss", (tmp_path / "log.txt").read_text())
    assert logged == ["0", "1"]
    state = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert state["iteration"] == 1
    assert (
        state["model"]["backbone.bottom_up.stem.conv1.norm.iters"].item() == 4
    )  # two forwards each
    cfg = LazyConfig.load(str(tmp_path / "users.py"))
    cfg.train.update(device="cpu", accumulation_steps=2)
    norm = lazy_trainer.build_model(cfg).backbone.bottom_up.stem.conv1.norm
    assert norm.clip_start == 2 * 100 and norm.warmup_iters == 2 * 99 + 1


@pytest.mark.parametrize("steps", [1, 2])
def test_a_resumed_run_equals_the_straight_one(steps, launcher, tmp_path):
    """Bit for bit, on the CPU, with train.seed."""
    options = ["train.max_iter=4", "train.eval_period=0", "train.checkpointer.period=2",
               "+train.seed=3", f"+train.accumulation_steps={steps}"]  # fmt: skip
    launcher(*options)
    straight = torch.load(tmp_path / "model_final.pth", weights_only=False)
    # As after a kill: the last checkpoint is that of two iterations.
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    launcher("--resume", *options)
    resumed = torch.load(tmp_path / "model_final.pth", weights_only=False)
    for part in ("model", "trainer"):
        before, after = flat(straight[part]), flat(resumed[part])
        assert before.keys() == after.keys()
        for key, value in before.items():
            same = torch.equal(value, after[key]) if torch.is_tensor(value) else value == after[key]
            assert same, key
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == [0, 1, 2, 3, 2, 3]


def test_bad_images(launcher, tmp_path):
    records = DatasetCatalog.get("small_scenes_train")[:3]
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no picture")
    records[1] = {**records[1], "file_name": str(damaged)}
    DatasetCatalog.register("damaged_scenes", lambda: records)
    classes = MetadataCatalog.get("small_scenes_train").thing_classes
    MetadataCatalog.get("damaged_scenes").set(thing_classes=classes)
    options = ["dataloader.train.dataset.names=damaged_scenes", "dataloader.train.num_workers=0",
               "train.max_iter=3", "train.eval_period=0"]  # fmt: skip
    try:
        with pytest.raises(
            SystemExit, match='damaged.png can.t be used .*set train.bad_input to "skip"'
        ):
            launcher(*options)
        launcher(*options, "+train.bad_input=skip")
    finally:
        DatasetCatalog.remove("damaged_scenes")
        MetadataCatalog.remove("damaged_scenes")
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    last = [line for line in lines if "total_loss" in line][-1]
    assert last["iteration"] == 2 and last["bad_images"] >= 1  # one of three images


def test_what_follows_from_an_evaluation(launcher, tmp_path):
    """Validation loss, best checkpoint, early stopping and pictures, as of the YAML trainer."""
    launcher(
        "train.max_iter=6", "train.eval_period=1", "+train.validation_loss=True",
        "+train.best_metric=auto", "+train.early_stopping_patience=2", "+train.pictures=1",
        "model.roi_heads.box_predictor.test_score_thresh=0.0", "train.checkpointer.period=100",
    )  # fmt: skip
    best = json.loads((tmp_path / "model_best.json").read_text())
    assert best["metric"] == "segm/AP"
    state = torch.load(tmp_path / "model_best.pth", weights_only=False)
    assert state["iteration"] + 1 == best["iterations"] and len(state["classes"]) == 10
    last = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert last["iteration"] + 1 == min(best["iterations"] + 2, 6) == best["evaluated"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert any({"validation/total_loss", "validation/loss_mask"} <= line.keys() for line in lines)
    assert sum("segm/AP" in line for line in lines) == best["evaluated"]
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["predictions/0"]


def test_signal_to_the_group_writes_a_checkpoint(tmp_path):
    """The trainer gets the batches of its iteration: loader workers leave the signal to it."""
    twin, config = str(ROOT / f"configs/lazy/{NAMES[1]}.py"), tmp_path / "users.py"
    config.write_text(USERS.format(twin=twin, output=str(tmp_path)) + SIGNALLED)
    process = start(
        "lazyconfig_train_net.py", "--config-file", config, "--num-gpus", 0, start_new_session=True
    )
    lines, sent = [], False
    for line in process.stdout:
        lines.append(line)
        if "iter: 3 " in line and not sent:
            sent = True
            os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM, "".join(lines[-30:])
    assert not [line for line in lines if "Traceback" in line], "".join(lines[-30:])
    assert re.fullmatch(r"model_0{6}\d\.pth", (tmp_path / "last_checkpoint").read_text())
    assert_ended(process.pid)


def test_settings_of_batch_renorm():
    cfg = LazyConfig.load(str(ROOT / f"configs/lazy/{NAMES[1]}.py"))
    cfg.train.device, cfg.train.brn = "cpu", {"warmup_iters": 7, "r_max": 2.0}
    cfg.model.backbone.bottom_up.stem.norm = "BRN"
    norm = lazy_trainer.build_model(cfg).backbone.bottom_up.stem.conv1.norm
    assert type(norm) is BatchRenorm2d and (norm.warmup_iters, norm.r_max) == (7, 2.0)


def test_settings_of_several_processes(tmp_path):
    """All of train.ddp reaches DistributedDataParallel: here of one process."""
    net = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 1), "unused": torch.nn.Linear(2, 1)})
    net.forward = lambda x: net["used"](x)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        settings = {"broadcast_buffers": False, "find_unused_parameters": True}
        model = lazy_trainer.distribute(net, "cpu", fp16_compression=True, **settings)
        assert model.find_unused_parameters and not model.broadcast_buffers
        for _ in range(2):  # the second would wait for the unused one
            model(torch.full((1, 2), 1 / 3)).sum().backward()
        # It has been through float16, which 1/3 has not in full.
        assert net["used"].weight.grad[0, 0] == 2 * torch.tensor(1 / 3).half().float()
        with pytest.raises(TypeError, match="no_such"):
            lazy_trainer.distribute(net, "cpu", no_such=True)
        with pytest.raises(ConfigError, match='use "naiveSyncBN"'):
            lazy_trainer.distribute(torch.nn.SyncBatchNorm(4), "cpu")
    finally:
        torch.distributed.destroy_process_group()
