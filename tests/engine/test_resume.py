"""A resumed run: settings come from its config, everything else from its checkpoint."""

import shutil

import pytest
import torch

from commands import CONFIG, SMALL, run
from mabn_d2 import CheckpointError
from mabn_d2.engine import ConfigError, Trainer, check_config
from mabn_d2.engine.hooks.rank_states import restore_rank_states
from mabn_d2.engine.resume import check_same_run
from mabn_d2.layers import MABN2d


@pytest.fixture
def begun(digits_cfg, tmp_path):
    """The config of a run of 2 iterations, with its checkpoint."""
    digits_cfg.DATASETS.TEST = ()
    digits_cfg.SOLVER.MAX_ITER = 2
    digits_cfg.SOLVER.WARMUP_ITERS, digits_cfg.SOLVER.OPTIMIZER = 0, "SGD"
    digits_cfg.MODEL.FPN.OUT_CHANNELS = digits_cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = 8
    Trainer(digits_cfg).train()
    digits_cfg.SOLVER.MAX_ITER = 4
    return digits_cfg


def resumed(cfg):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    return trainer


def momenta(trainer):
    names = {param: name for name, param in trainer.model.named_parameters()}
    return {names[p]: s["momentum_buffer"] for p, s in trainer.optimizer.state.items()}


def test_rates_and_decays_take_effect(begun, caplog):
    before = momenta(resumed(begun))
    assert len(before) > 50
    begun.SOLVER.BASE_LR, begun.SOLVER.MOMENTUM = 0.5, 0.7
    # Groups are made of equal settings, so this changes which parameters are in which.
    begun.SOLVER.WEIGHT_DECAY, begun.SOLVER.WEIGHT_DECAY_NORM = 0.25, 0.125
    begun.SOLVER.BIAS_LR_FACTOR = 3.0
    begun.MODEL.ROI_HEADS.SCORE_THRESH_TEST, begun.MODEL.RPN.POST_NMS_TOPK_TEST = 0.25, 7
    trainer = resumed(begun)
    assert "MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.05 -> 0.25" in caplog.text
    assert trainer.model.proposal_generator.post_nms_topk[False] == 7
    assert "SOLVER.BASE_LR" in caplog.text and "-> 0.5" in caplog.text
    named = dict(trainer.model.named_parameters())
    groups = {id(p): g for g in trainer.optimizer.param_groups for p in g["params"]}
    settings = {
        name: (groups[id(p)]["lr"], groups[id(p)]["weight_decay"]) for name, p in named.items()
    }
    # The cosine schedule is half through.
    assert settings["backbone.bottom_up.stem.conv1.weight"] == (0.25, 0.25)
    assert settings["backbone.bottom_up.stem.conv1.norm.weight"] == (0.25, 0.125)
    assert settings["roi_heads.box_predictor.cls_score.bias"][0] == 0.75
    assert {g["momentum"] for g in trainer.optimizer.param_groups} == {0.7}
    after = momenta(trainer)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert trainer.scheduler.base_lrs == [g["initial_lr"] for g in trainer.optimizer.param_groups]
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.scheduler.get_lr()[0]


@pytest.mark.parametrize(
    "kind, settings",
    [("PolynomialLR", {"total_iters": 8}), ("OneCycleLR", {"max_lr": 0.01, "total_steps": 8})],
)
def test_schedulers_of_torch_go_on(begun, tmp_path, kind, settings, caplog):
    """Their rates, and OneCycleLR's momentum, follow from those of the iteration before."""

    class Own(Trainer):
        @classmethod
        def build_lr_scheduler(cls, cfg, optimizer):
            return getattr(torch.optim.lr_scheduler, kind)(optimizer, **settings)

    begun.OUTPUT_DIR = str(tmp_path / kind)
    straight = Own(begun)
    for _ in range(2):
        straight.optimizer.step()
        straight.scheduler.step()
    straight.checkpointer.save("model", iteration=1)
    trainer = Own(begun)
    trainer.resume_or_load(resume=True)
    for _ in range(2):
        for ours, theirs in zip(
            trainer.optimizer.param_groups, straight.optimizer.param_groups, strict=True
        ):
            assert {**ours, "params": None} == {**theirs, "params": None}
        for one in (trainer, straight):
            one.optimizer.step()
            one.scheduler.step()
    assert "has no effect" not in caplog.text
    begun.SOLVER.BASE_LR /= 2
    Own(begun).resume_or_load(resume=True)
    said = f"{kind} goes on with the rates in the checkpoint" in caplog.text
    assert said == (kind == "PolynomialLR")  # OneCycleLR has rates of its own
    begun.SOLVER.BIAS_LR_FACTOR = 3.0
    with pytest.raises(CheckpointError, match=f"groups of parameters, .* {kind} goes on"):
        Own(begun).resume_or_load(resume=True)


def test_nothing_changes_if_the_config_does_not(begun, caplog):
    trainer = resumed(begun)
    assert "settings that differ from those of the run so far, from iteration 2" in caplog.text
    assert "SOLVER.MAX_ITER 2 -> 4" in caplog.text and "BASE_LR" not in caplog.text
    assert trainer.start_iter == 2


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("SOLVER.OPTIMIZER", "ADAMW", "SOLVER.OPTIMIZER is ADAMW, but the run .* has SGD"),
        ("DATASETS.TRAIN", ("small_scenes_val",), r"DATASETS.TRAIN is \['small_scenes_val'\], but"),
        ("MODEL.FPN.OUT_CHANNELS", 16, "a run with other MODEL.FPN.OUT_CHANNELS"),
    ],
)
def test_what_can_not_change(begun, tmp_path, key, value, message):
    folder = tmp_path / "output"
    (folder / "config.yaml").write_text(begun.dump())
    begun.merge_from_list([key, value])
    with pytest.raises(ConfigError, match=message):  # of the command
        check_config(begun, resume=True)
    with pytest.raises(ConfigError, match=message):  # a script of one's own
        resumed(begun)


def test_another_optimizer_without_a_config_in_the_checkpoint(begun, tmp_path):
    path = tmp_path / "output/model_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["config"]
    torch.save(checkpoint, path)
    begun.SOLVER.OPTIMIZER = "ADAMW"
    with pytest.raises(CheckpointError, match="written with SOLVER.OPTIMIZER SGD, not ADAMW"):
        resumed(begun)


@pytest.mark.parametrize("scale, then", [(2.0**14, None), (None, 2.0**14)])
def test_another_loss_scale(digits_cfg, tmp_path, scale, then):
    """The gradient windows hold scaled statistics: a run with another scale goes on as it would have."""
    digits_cfg.DATASETS.TEST = ()
    digits_cfg.MODEL.MABN.SIMULATED_BATCH_SIZE, digits_cfg.MODEL.MABN.WARMUP_ITERS = 4, 1
    digits_cfg.MODEL.FPN.OUT_CHANNELS = digits_cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = 8
    trainers = []
    for name, parts in (("plain", {3: None}), ("scaled", {2: scale, 3: then})):
        digits_cfg.OUTPUT_DIR = str(tmp_path / name)
        torch.manual_seed(0)
        for max_iter, of_part in parts.items():
            trainer = Trainer(digits_cfg)
            if of_part:
                trainer._trainer.grad_scaler = torch.amp.GradScaler("cpu", of_part)
            trainer.resume_or_load(resume=True)
            trainer.max_iter = max_iter
            trainer.train()
        trainers.append(trainer)
    norms = [[m for m in t.model.modules() if isinstance(m, MABN2d)] for t in trainers]
    for ours, theirs in zip(*norms, strict=True):
        psi = theirs.buffer_gz / (then or 1)
        torch.testing.assert_close(psi, ours.buffer_gz, rtol=1e-3, atol=1e-6)
    for ours, theirs in zip(*(t.model.parameters() for t in trainers), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5)


def test_a_new_run_has_its_own_schedule(begun, tmp_path):
    """The counters and windows in the weights that it starts from are those of another run."""
    begun.MODEL.FPN.NORM = "BRN"
    begun.OUTPUT_DIR = str(tmp_path / "first")
    Trainer(begun).train()
    begun.MODEL.WEIGHTS, begun.OUTPUT_DIR = f"{tmp_path}/first/model_final.pth", f"{tmp_path}/new"
    saved = torch.load(begun.MODEL.WEIGHTS, weights_only=False)["model"]
    trainer = Trainer(begun)
    trainer.resume_or_load(resume=False)
    counters = 0
    for name, value in trainer.model.state_dict().items():
        if name.endswith((".buffer_x2", ".buffer_gz", ".iters", ".num_batches_tracked")):
            assert saved[name].any() and not value.any(), name
            counters += value.numel() == 1
        else:
            assert torch.equal(value, saved[name]), name
    assert counters == 24
    # `convert_weights.py --keep-buffers` leaves them in its file for the run that starts from it.
    torch.save({"model": saved, "mabn_d2": {"config": {}}}, tmp_path / "kept.pth")
    trainer.cfg.MODEL.WEIGHTS = str(tmp_path / "kept.pth")
    trainer.resume_or_load(resume=False)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_frozen_layers_of_random_weights(begun, tmp_path, caplog):
    begun.OUTPUT_DIR, begun.MODEL.BACKBONE.FREEZE_AT = str(tmp_path / "new"), 1
    trainer = Trainer(begun)
    for weights, said in (("", 1), (f"{tmp_path}/output/model_final.pth", 0)):
        caplog.clear()
        trainer.cfg.MODEL.WEIGHTS = weights
        trainer.resume_or_load(resume=False)
        lines = [line for line in caplog.messages if "stay random" in line]
        assert len(lines) == said
        assert all("stem.conv1" in x and "BACKBONE.FREEZE_AT 0" in x for x in lines)


def test_as_many_checkpoints_as_without_a_break(begun, tmp_path):
    """SOLVER.CHECKPOINTS_TO_KEEP counts those of before, too."""
    begun.SOLVER.CHECKPOINT_PERIOD, begun.SOLVER.CHECKPOINTS_TO_KEEP = 1, 2
    begun.OUTPUT_DIR = str(tmp_path / "kept")
    for max_iter in (3, 4):
        trainer = resumed(begun)
        trainer.max_iter = max_iter
        trainer.train()
    found = sorted(path.name for path in (tmp_path / "kept").glob("*.pth"))
    assert found == ["model_0000002.pth", "model_0000003.pth", "model_final.pth"]


def test_past_the_end(begun, caplog):
    begun.SOLVER.MAX_ITER = 2
    trainer = resumed(begun)
    assert "has 2 iterations and SOLVER.MAX_ITER is 2: nothing is left to train" in caplog.text
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


@pytest.mark.timeout(900)
def test_two_processes_resume_bit_for_bit(tmp_path):
    """Each rank's own statistics are in the checkpoint: straight run and resumed one are equal."""
    options = [*SMALL, "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", 2, "SEED", 1,
               "DATALOADER.NUM_WORKERS", 0, "SOLVER.MAX_ITER", 4, "MODEL.MABN.WARMUP_ITERS", 1,
               "MODEL.MABN.SIMULATED_BATCH_SIZE", 2]  # fmt: skip
    flags = ["--config-file", CONFIG, "--num-gpus", 2, "--dist-url", "auto"]
    done = run("train_net.py", *flags, *options, "OUTPUT_DIR", tmp_path / "straight")
    assert done.returncode == 0, done.stderr[-3000:]
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "straight/model_0000001.pth", tmp_path / "resumed")
    (tmp_path / "resumed/last_checkpoint").write_text("model_0000001.pth")
    done = run("train_net.py", *flags, "--resume", *options, "OUTPUT_DIR", tmp_path / "resumed")
    assert done.returncode == 0 and "differ from those" not in done.stdout, done.stderr[-3000:]
    one, two = (
        torch.load(tmp_path / run / "model_final.pth", weights_only=False)
        for run in ("straight", "resumed")
    )
    ranks = one["rank_states"]["buffers"]
    stem = "backbone.bottom_up.stem.conv1.norm.running_var"
    assert len(ranks) == 2 and not torch.equal(ranks[0][stem], ranks[1][stem])
    assert_equal(one["model"], two["model"])
    assert_equal(one["rank_states"], two["rank_states"])
    assert_equal(one["trainer"], two["trainer"])


@pytest.mark.parametrize("extra", [{}, {"rank_states": {"buffers": [{}, {}]}}, {"rank_states": 3}])
def test_another_number_of_processes(extra, caplog):
    layer = MABN2d(3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    restore_rank_states(layer, extra)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert ("statistics of 2 processes, and 1 resume it" in caplog.text) == (
        "buffers" in str(extra)
    )


def assert_equal(one, two, path=""):
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            assert_equal(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), path
        for i, pair in enumerate(zip(one, two, strict=True)):
            assert_equal(*pair, f"{path}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), path
    else:
        assert one == two, path


def test_run_of_the_other_backbone_name_goes_on(digits_cfg):
    """With MABN both names build the same model; configs of earlier runs have the general one."""
    digits_cfg.MODEL.BACKBONE.NAME = "build_any_norm_resnet_fpn_backbone"
    before = digits_cfg.dump()
    digits_cfg.MODEL.BACKBONE.NAME = "build_mabn_resnet_fpn_backbone"
    assert check_same_run(digits_cfg, before, "config.yaml") == []
    digits_cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    with pytest.raises(ConfigError, match=r"other MODEL\.BACKBONE\.NAME"):
        check_same_run(digits_cfg, before, "config.yaml")
