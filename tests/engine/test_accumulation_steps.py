"""SOLVER.ACCUMULATION_STEPS: micro-batches in one process do what as many processes do."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from detectron2.utils.events import EventStorage

from commands import SMALL, train
from mabn_d2.data.batches import TrainingBatches
from mabn_d2.engine import ConfigError, Trainer, check_config
from mabn_d2.engine.guarded_trainer import GuardedDDP, GuardedTrainer
from mabn_d2.layers import BatchRenorm2d, MABN2d
from mabn_d2.modeling.norm_table import norm_settings

NODES = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


def with_norm(norm):
    backbone = ["MODEL.BACKBONE.NAME", "build_any_norm_resnet_fpn_backbone"]
    return [*backbone, *(item for node in NODES for item in (f"MODEL.{node}.NORM", norm))]


def make_retinanet(cfg):
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_ON = "RetinaNet", False
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.NORM = 10, "MABN"


def weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=False)["model"]


def test_micro_batches_are_as_good_as_processes(tmp_path):
    """Three iterations of 4 micro-batches on one process, and of 2 on each of two processes."""
    wide = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32,
            "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.CONV_DIM", 32,
            "MODEL.ROI_MASK_HEAD.CONV_DIM", 32]  # fmt: skip
    found = {}
    for processes, steps in ((1, 4), (2, 2)):
        folder = tmp_path / f"{processes}x{steps}"
        done = train(
            "--num-gpus", processes, "--dist-url", "auto", *SMALL, *wide, *with_norm("GN"),
            "SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATION_STEPS", steps, "SOLVER.MAX_ITER", 3,
            "SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.02, "SOLVER.WARMUP_ITERS", 0, "DATASETS.TEST", "()", "OUTPUT_DIR", folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found[processes] = weights(folder)
    for name, value in found[1].items():
        torch.testing.assert_close(found[2][name], value, rtol=1e-4, atol=1e-6)


class Data(list):
    """Endless copies of given batches."""

    def __iter__(self):
        return (copy.deepcopy(batch) for batch in itertools.cycle(list(super().__iter__())))


def trained(cfg, batches, iterations, **options):
    """Return the GuardedTrainer of a model of `cfg` after some iterations of SGD."""
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    trainer = GuardedTrainer(model, Data(batches), optimizer, seed=3, **options)
    trainer.iter = 0
    with EventStorage() as trainer.storage:
        for trainer.iter in range(iterations):
            trainer.run_step()
    return trainer


def grads(trainer):
    return torch.cat([p.grad.flatten() for p in trainer.params])


@pytest.fixture
def scenes_cfg(digits_cfg):
    digits_cfg.DATASETS.TEST = ()
    return digits_cfg


def first_batch(cfg, images, steps=1):
    cfg = cfg.clone()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS = images, steps
    return next(iter(Trainer.build_train_loader(cfg)))


@pytest.mark.parametrize("steps, amp", [(3, False), (2, True)])  # bfloat16 rounds a third
def test_gradients_are_the_mean_over_micro_batches(scenes_cfg, steps, amp, monkeypatch):
    scenes_cfg.merge_from_list(with_norm(""))
    batch = first_batch(scenes_cfg, 2 * steps)
    accumulated = trained(scenes_cfg, [batch], 1, accumulation_steps=steps, amp=amp)
    alone = []
    for k in range(steps):
        # The seed of a micro-batch is that of the rank which has it in a run of several processes.
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda k=k: k)
        alone.append(grads(trained(scenes_cfg, [batch[2 * k : 2 * k + 2]], 1, amp=amp)))
    mean = torch.stack(alone).mean(0)
    assert mean.norm() > 0.1
    torch.testing.assert_close(grads(accumulated), mean, rtol=1e-4, atol=1e-6)


def test_losses_are_the_mean_over_micro_batches(scenes_cfg):
    batch = first_batch(scenes_cfg, 2)
    one = trained(scenes_cfg, [batch], 1)
    names = [name for name in one.storage.latest() if name.startswith("loss")]
    assert len(names) == 5
    twice = trained(scenes_cfg, [[*batch, *batch]], 1, accumulation_steps=2)
    for name in (*names, "total_loss"):
        value, mean = one.storage.latest()[name][0], twice.storage.latest()[name][0]
        assert mean == pytest.approx(value, rel=0.3)  # the draws of anchors and RoIs differ


def test_the_optimizer_and_the_clipping_act_once(scenes_cfg):
    scenes_cfg.SOLVER.IMS_PER_BATCH, scenes_cfg.SOLVER.ACCUMULATION_STEPS = 4, 2
    scenes_cfg.SOLVER.MAX_ITER = 3
    scenes_cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1e-3
    trainer = Trainer(scenes_cfg)
    norms, clipped = [], []
    step = trainer.optimizer.step
    params = trainer._trainer.params

    def counted(*args, **kwargs):
        norms.append(torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm())
        step(*args, **kwargs)
        clipped.append(torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm())

    trainer.optimizer.step = counted
    trainer.train()
    assert len(norms) == 3 and min(norms) > 0.1  # not clipped before, that is, once a micro-batch
    torch.testing.assert_close(torch.stack(clipped), torch.full((3,), 1e-3), rtol=1e-3, atol=0)
    layer = next(m for m in trainer.model.modules() if isinstance(m, MABN2d))
    assert layer.iters == 6 and layer.window == 16 and layer.batch_size == 2


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_bad_micro_batch_rejects_the_iteration(scenes_cfg, place):
    good, bad = first_batch(scenes_cfg, 6), first_batch(scenes_cfg, 6)
    bad[2 * place]["image"] = torch.full_like(bad[2 * place]["image"], 0).float() + torch.nan
    before = trained(scenes_cfg, [good], 1, accumulation_steps=3)
    after = trained(scenes_cfg, [good, bad], 2, accumulation_steps=3)
    assert (before.rejected, after.rejected) == (0, 1)
    for (name, p), q in zip(before.model.named_parameters(), after.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    layer = after.model.backbone.bottom_up.stem.conv1.norm
    # The two good micro-batches count in the statistics, as they do on their ranks.
    assert layer.iters == 5 and layer.rejected == 1 and layer.running_var.isfinite().all()


def test_processes_exchange_gradients_once(scenes_cfg, tmp_path):
    """A communication hook sees each gradient once; one rank is enough to count."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        scenes_cfg.merge_from_list(with_norm(""))
        model = GuardedDDP(Trainer.build_model(scenes_cfg), bucket_cap_mb=1000)
        exchanged = []

        def hook(state, bucket):
            exchanged.append(bucket.buffer().clone())
            return torch.futures.collect_all([]).then(lambda _: bucket.buffer())

        model.register_comm_hook(None, hook)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        data = Data([first_batch(scenes_cfg, 6)])
        trainer = GuardedTrainer(model, data, optimizer, accumulation_steps=3)
        with EventStorage():
            trainer.iter = 0
            trainer.run_step()
        # The exchange holds the sum of all micro-batches: what the gradients are afterwards.
        total = sum(bucket.double().square().sum() for bucket in exchanged)
        own = sum(p.grad.double().square().sum() for p in trainer.params)
        sizes = sum(bucket.numel() for bucket in exchanged)
        assert sizes == sum(p.numel() for p in trainer.params)
        torch.testing.assert_close(total, own)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("norm", ["MABN", "BRN"])
def test_schedules_of_norms_stay_in_iterations(scenes_cfg, norm):
    scenes_cfg.merge_from_list(with_norm(norm))
    scenes_cfg.MODEL.MABN.WARMUP_ITERS, scenes_cfg.MODEL.MABN.CLIP_START = 10, 20
    scenes_cfg.MODEL.BRN.WARMUP_ITERS, scenes_cfg.MODEL.BRN.R_MAX_ITER = 10, 20
    scenes_cfg.SOLVER.IMS_PER_BATCH, scenes_cfg.SOLVER.ACCUMULATION_STEPS = 16, 8
    assert norm_settings(scenes_cfg)["batch_size"] == 2
    assert norm_settings(scenes_cfg)["warmup_iters"] == 10
    model = Trainer.build_model(scenes_cfg)
    layers = [m for m in model.modules() if isinstance(m, (MABN2d, BatchRenorm2d))]
    assert len(layers) == 24
    for layer in layers:
        if norm == "MABN":
            assert (layer.warmup_iters, layer.clip_start, layer.window) == (73, 160, 16)
        else:
            assert (layer.warmup_iters, layer.r_max_iter) == (80, 160)


@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "RetinaNet"])
def test_resumed_run_equals_the_straight_one(scenes_cfg, tmp_path, architecture):
    """RetinaNet has an average besides its parameters and buffers: of the positive anchors."""
    if architecture == "RetinaNet":
        make_retinanet(scenes_cfg)
    scenes_cfg.SOLVER.IMS_PER_BATCH, scenes_cfg.SOLVER.ACCUMULATION_STEPS = 6, 3
    scenes_cfg.MODEL.MABN.SIMULATED_BATCH_SIZE = 4
    scenes_cfg.MODEL.MABN.WARMUP_ITERS = scenes_cfg.MODEL.MABN.CLIP_START = 1
    states = []
    for name in ("straight", "resumed"):
        scenes_cfg.OUTPUT_DIR = str(tmp_path / name)
        torch.manual_seed(0)
        trainer = Trainer(scenes_cfg)
        if name == "resumed":
            trainer.max_iter = 2
            trainer.train()
            torch.manual_seed(1)
            trainer = Trainer(scenes_cfg)
            trainer.resume_or_load(resume=True)
            assert trainer.start_iter == 2
        trainer.train()
        states.append(trainer.model.state_dict())
    # torch.jit optimizes RetinaNet's focal loss after its first calls, which rounds otherwise.
    tolerance = (0, 0) if architecture == "GeneralizedRCNN" else (1e-3, 1e-4)
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=tolerance[0], atol=tolerance[1])


def test_other_accumulation_at_resume_is_said(scenes_cfg, caplog):
    scenes_cfg.SOLVER.IMS_PER_BATCH, scenes_cfg.SOLVER.MAX_ITER = 4, 1
    Trainer(scenes_cfg).train()
    scenes_cfg.SOLVER.ACCUMULATION_STEPS, scenes_cfg.SOLVER.MAX_ITER = 2, 2
    trainer = Trainer(scenes_cfg)
    trainer.resume_or_load(resume=True)
    assert "SOLVER.ACCUMULATION_STEPS is 2, the checkpoint was written with 1" in caplog.text
    trainer.train()


def test_precise_statistics_take_micro_batches(scenes_cfg):
    scenes_cfg.SOLVER.IMS_PER_BATCH, scenes_cfg.SOLVER.ACCUMULATION_STEPS = 4, 2
    scenes_cfg.SOLVER.MAX_ITER = 1
    scenes_cfg.TEST.PRECISE_BN.ENABLED, scenes_cfg.TEST.PRECISE_BN.NUM_ITER = True, 2
    scenes_cfg.MODEL.BACKBONE.NAME = "build_any_norm_resnet_fpn_backbone"
    scenes_cfg.MODEL.FPN.NORM = "BN"
    scenes_cfg.MODEL.MABN.SYNC_BEFORE_EVAL, scenes_cfg.MODEL.MABN.LOG_PERIOD = True, 1
    trainer = Trainer(scenes_cfg)
    sizes = []
    trainer.model.register_forward_pre_hook(lambda model, args: sizes.append(len(args[0])))
    trainer.train()
    assert set(sizes) == {2}
    assert len(sizes) > 2 + 4  # those of training, of BatchNorm's and of MABN's


@pytest.mark.parametrize(
    "images, steps, workers, message",
    [
        (2, 0, 1, "SOLVER.ACCUMULATION_STEPS is 0"),
        (2, -1, 1, "SOLVER.ACCUMULATION_STEPS is -1"),
        (16, 3, 1, "use one of 1, 2, 4, 8, 16"),
        (16, 8, 4, "4 images that each process has"),
        (2, 4, 1, "2 images that each process has"),
        (3, 3, 2, "SOLVER.IMS_PER_BATCH is 3, no multiple of the 2"),
    ],
)
def test_what_does_not_divide_is_one_line(scenes_cfg, images, steps, workers, message):
    scenes_cfg.SOLVER.IMS_PER_BATCH, scenes_cfg.SOLVER.ACCUMULATION_STEPS = images, steps
    with pytest.raises(ConfigError) as error:
        check_config(scenes_cfg, workers=workers)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("group", [False, True])
def test_micro_batches_see_what_ranks_see(monkeypatch, group):
    from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler

    shapes = [(2, 1) if i % 3 else (1, 2) for i in range(30)]
    for make in (
        lambda: TrainingSampler(30, seed=5),
        lambda: RepeatFactorTrainingSampler(torch.linspace(1, 3, 30), seed=5),
    ):
        one = TrainingBatches(shapes, make(), 2, group, 7, 3)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 3)
        ranks = []
        for rank in range(3):
            monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            ranks.append(TrainingBatches(shapes, make(), 2, group, 7))
            ranks[-1] = list(itertools.islice(ranks[-1], 20))
        monkeypatch.undo()
        together = [sum(parts, []) for parts in zip(*ranks, strict=True)]
        assert list(itertools.islice(one, 20)) == together
        assert len({index for batch in together for index, _ in batch}) == 30
        one.start = 13
        assert list(itertools.islice(one, 7)) == together[13:]
        assert np.unique([len(batch) for batch in together]) == [6]


@pytest.mark.slow
def test_published_config_on_one_process(tmp_path):
    """The published 2x file with SOLVER.ACCUMULATION_STEPS 8: 16 images a step, 2 at a time."""
    done = train(
        "--config-file", "configs/mask_rcnn_R50_FPN_mabn_2x.yaml", "--num-gpus", 0,
        "SOLVER.ACCUMULATION_STEPS", 8, "SOLVER.MAX_ITER", 2, "MODEL.WEIGHTS", "",
        "DATASETS.TRAIN", "('digit_scenes_train',)", "DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path,
        "MODEL.ROI_HEADS.NUM_CLASSES", 10, "INPUT.MASK_FORMAT", "bitmask",
        "INPUT.MIN_SIZE_TRAIN", "(96,)", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    state = weights(tmp_path)
    norm = {
        k.rpartition(".")[2]: v
        for k, v in state.items()
        if k.startswith("backbone.bottom_up.stem.conv1.norm.")
    }
    assert norm["iters"].item() == 16 and norm["buffer_x2"].shape == (16, 64)
    assert all(value.isfinite().all() for value in state.values())
