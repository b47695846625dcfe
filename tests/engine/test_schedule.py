"""Schedules that follow from the number of images; the configs for own images."""

import math
from types import SimpleNamespace

import pytest
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from mabn_d2 import add_mabn_config
from mabn_d2.data.errors import DataError
from mabn_d2.engine import ConfigError, Trainer, read_config, setup_config
from mabn_d2.engine.schedule import (
    finalize_schedule,
    log_schedule,
    scale_to_processes,
    training_images,
)
from mabn_d2.engine.value_check import check_values
from paths import ROOT

NAMES = ("mask_rcnn", "faster_rcnn", "retinanet")


# What the digit scenes need.
DIGITS = ["MODEL.ROI_HEADS.NUM_CLASSES", 10, "INPUT.MASK_FORMAT", "bitmask"]


def own_data(name="mask_rcnn", *opts):
    return read_config(str(ROOT / f"configs/own_data_{name}_R50_FPN_mabn.yaml"), list(opts))


def keys(cfg):
    solver, mabn = cfg.SOLVER, cfg.MODEL.MABN
    return {
        "length": solver.MAX_ITER,
        "rate": solver.BASE_LR,
        "rate warm-up": solver.WARMUP_ITERS,
        "checkpoint": solver.CHECKPOINT_PERIOD,
        "evaluation": cfg.TEST.EVAL_PERIOD,
        "plain": mabn.WARMUP_ITERS,
        "unclipped": mabn.CLIP_START,
    }


@pytest.mark.parametrize(
    "images, epochs, batch", [(200, 60, 8), (13, 7, 4), (1, 1, 8), (9000, 60, 2)]
)
def test_everything_follows_from_the_images(images, epochs, batch):
    cfg = own_data("mask_rcnn", "SOLVER.EPOCHS", epochs, "SOLVER.IMS_PER_BATCH", batch)
    finalize_schedule(cfg, images)
    length = math.ceil(images * epochs / batch)
    assert keys(cfg) == {
        "length": length,
        "rate": pytest.approx(0.02 * batch / 16),
        "rate warm-up": min(length // 10, 500),
        "checkpoint": max(length // 20, 1),
        "evaluation": max(length // 20, 1),
        "plain": min(int(0.15 * length), 600),
        "unclipped": min(int(0.3 * length), 1200),
    }
    final = cfg.dump()
    assert "-1" not in str(keys(cfg))
    finalize_schedule(cfg, 7 * images)
    assert cfg.dump() == final  # the config.yaml of a run repeats it


def test_what_is_given_wins():
    given = {"SOLVER.MAX_ITER": 300, "SOLVER.BASE_LR": 0.5, "SOLVER.WARMUP_ITERS": 1,
             "SOLVER.CHECKPOINT_PERIOD": 7, "TEST.EVAL_PERIOD": 0, "MODEL.MABN.WARMUP_ITERS": 2,
             "MODEL.MABN.CLIP_START": 3}  # fmt: skip
    cfg = own_data("mask_rcnn", *(part for item in given.items() for part in item))
    finalize_schedule(cfg)  # without images: nothing depends on them
    assert list(keys(cfg).values()) == [300, 0.5, 1, 7, 0, 2, 3]
    cfg = own_data("mask_rcnn", "SOLVER.MAX_ITER", 300)
    finalize_schedule(cfg)
    assert keys(cfg)["length"] == 300 and keys(cfg)["plain"] == 45 and keys(cfg)["evaluation"] == 15


def test_retinanet_has_its_own_rate():
    rates = {}
    for name in NAMES:
        cfg = own_data(name)
        finalize_schedule(cfg, 100)
        rates[name] = cfg.SOLVER.BASE_LR
    assert rates == {"mask_rcnn": 0.01, "faster_rcnn": 0.01, "retinanet": 0.005}


def test_steps_that_are_left_empty():
    for given, steps in (((), (500, 666)), ((9,), (9,))):
        cfg = own_data("mask_rcnn", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR")
        cfg.SOLVER.STEPS = given
        finalize_schedule(cfg, 100)
        assert cfg.SOLVER.MAX_ITER == 750 and steps == cfg.SOLVER.STEPS


@pytest.mark.parametrize("length, steps", [(1, ()), (2, (1,)), (3, (2,)), (9, (6, 8))])
def test_steps_of_a_short_training(length, steps, caplog):
    caplog.set_level("INFO")
    cfg = own_data("mask_rcnn", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.EPOCHS", 1)
    finalize_schedule(cfg, 8 * length)
    log_schedule(cfg)
    check_values(cfg)
    assert length == cfg.SOLVER.MAX_ITER and steps == cfg.SOLVER.STEPS
    assert (", ".join(map(str, steps)) or "no decay") + ", MODEL.MABN.WARMUP_ITERS" in caplog.text


def test_no_steps_are_no_decay(digits_cfg):
    """Where the length is given, as Detectron2's tutorial says."""
    digits_cfg.SOLVER.LR_SCHEDULER_NAME, digits_cfg.SOLVER.STEPS = "WarmupMultiStepLR", ()
    finalize_schedule(digits_cfg)
    assert digits_cfg.SOLVER.STEPS == ()
    check_values(digits_cfg)


def test_other_configs_stay_as_they_are():
    for path in ROOT.glob("configs/**/*_2x.yaml"):
        cfg = read_config(str(path))
        before = cfg.dump()
        finalize_schedule(cfg)
        assert cfg.dump() == before


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SOLVER.EPOCHS", 0], "SOLVER.MAX_ITER is -1 .automatic. and SOLVER.EPOCHS is 0"),
        (["SOLVER.LR_FOR_16_IMAGES", 0.0], "SOLVER.BASE_LR is -1 .automatic."),
        (["DATASETS.TRAIN", ()], "DATASETS.TRAIN is empty: .* --data FOLDER"),
        (
            ["DATASETS.TRAIN", ("small_scene_train",)],
            "DATASETS.TRAIN names 'small_scene_train', which is not registered .did you mean small_scenes_train",
        ),
    ],
)
def test_errors(opts, message, small_scenes):
    cfg = own_data("mask_rcnn", "DATASETS.TRAIN", ("small_scenes_train",), *DIGITS, *opts)
    with pytest.raises((ConfigError, DataError), match=message):
        finalize_schedule(cfg)
    finalize_schedule(own_data("mask_rcnn"), train=False)  # an evaluation has no length


def test_weights_if_present(tmp_path):
    file = tmp_path / "R50-wc.pth"
    opts = ["MODEL.WEIGHTS_IF_PRESENT", str(file)]
    for there, given, found in (
        (False, "", ""),
        (True, "", str(file)),
        (True, "mine.pth", "mine.pth"),
    ):
        if there:
            file.touch()
        cfg = own_data("mask_rcnn", *opts, "MODEL.WEIGHTS", given)
        finalize_schedule(cfg, 10)
        assert found == cfg.MODEL.WEIGHTS and cfg.MODEL.WEIGHTS_IF_PRESENT == ""


def test_a_script_of_ones_own_gets_the_same(digits_cfg, caplog):
    cfg = digits_cfg
    cfg.merge_from_list(["SOLVER.EPOCHS", 2, "SOLVER.MAX_ITER", -1, "SOLVER.BASE_LR", -1.0,
                         "MODEL.MABN.WARMUP_ITERS", -1, "MODEL.MABN.CLIP_START", -1])  # fmt: skip
    cfg.DATASETS.TEST = ()
    cfg.freeze()
    assert training_images(cfg) == 24
    with caplog.at_level("INFO"):
        trainer = Trainer(cfg)
    assert trainer.max_iter == trainer.cfg.SOLVER.MAX_ITER == 24 and cfg.SOLVER.MAX_ITER == -1
    assert trainer.model.backbone.bottom_up.stem.conv1.norm.clip_start == 7
    assert trainer.optimizer.defaults["lr"] == 0.02 * 2 / 16
    assert "Training for 24 iterations of 2 images" in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_models_build_without_a_schedule(name):
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(str(ROOT / f"configs/own_data_{name}_R50_FPN_mabn.yaml"))
    cfg.MODEL.DEVICE = "meta"
    assert build_model(cfg).backbone.bottom_up.stem.conv1.norm.warmup_iters == 4 * 99 + 1


def test_another_number_of_processes(tmp_path, small_scenes):
    """SOLVER.REFERENCE_WORLD_SIZE: automatic values first, then the scale, then the checks."""
    arguments = {"num_gpus": 0, "num_machines": 1, "resume": False, "eval_only": False}
    config = str(ROOT / "configs/own_data_mask_rcnn_R50_FPN_mabn.yaml")
    opts = ["DATASETS.TRAIN", "('small_scenes_train',)", "OUTPUT_DIR", str(tmp_path / "run"),
            "SOLVER.REFERENCE_WORLD_SIZE", "4", "SOLVER.ACCUMULATION_STEPS", "1",
            "MODEL.MABN.CLIP_START", "600", "MODEL.BRN.WARMUP_ITERS", "7", *map(str, DIGITS)]  # fmt: skip
    cfg = setup_config(SimpleNamespace(config_file=config, opts=opts, **arguments))
    assert list(keys(cfg).values()) == [720, 0.0025, 72, 36, 36, 108, 2400]
    brn = cfg.MODEL.BRN
    assert (brn.WARMUP_ITERS, brn.R_MAX_ITER, brn.D_MAX_ITER) == (28, 160000, 100000)
    assert cfg.SOLVER.IMS_PER_BATCH == 2 and cfg.SOLVER.REFERENCE_WORLD_SIZE == 1
    assert scale_to_processes(cfg, 1) is cfg  # as `Trainer` does again
    short = read_config(config, [*opts, "SOLVER.MAX_ITER", "9", "TEST.EVAL_PERIOD", "3"])
    finalize_schedule(short)
    many = scale_to_processes(short, 32)
    assert (many.TEST.EVAL_PERIOD, many.SOLVER.CHECKPOINT_PERIOD) == (1, 1)
    with pytest.raises(ConfigError, match="REFERENCE_WORLD_SIZE is 3, which does not divide"):
        setup_config(SimpleNamespace(config_file=config, opts=[*opts, "SOLVER.REFERENCE_WORLD_SIZE",
                                                               "3"], **arguments))  # fmt: skip


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SOLVER.EPOCHS", "5"], "SOLVER.EPOCHS is 5, but .*: set SOLVER.MAX_ITER -1 too"),
        (
            ["SOLVER.LR_FOR_16_IMAGES", "0.1"],
            "LR_FOR_16_IMAGES is 0.1, .*: set SOLVER.BASE_LR -1.0 too",
        ),
    ],
)
def test_keys_that_another_one_comes_before(opts, message, tmp_path, small_scenes):
    """As with the config.yaml of a run, where every automatic key has its value."""
    arguments = {"num_gpus": 0, "num_machines": 1, "resume": False, "eval_only": False}
    config = str(ROOT / "configs/digits/scratch_mask_rcnn_R18_FPN_mabn.yaml")
    with pytest.raises(ConfigError, match=message):
        setup_config(SimpleNamespace(config_file=config, opts=opts, **arguments))
    users = tmp_path / "users.yaml"  # in front of a base with numbers
    users.write_text(f"_BASE_: {config}\n{opts[0].replace('.', ': {')}: {opts[1]}}}\n")
    with pytest.raises(ConfigError, match=message):
        setup_config(SimpleNamespace(config_file=str(users), opts=[], **arguments))
    if "EPOCHS" in opts[0]:
        opts = [*map(str, DIGITS), "SOLVER.MAX_ITER", "4", "OUTPUT_DIR", str(tmp_path / "run")]
        setup_config(SimpleNamespace(config_file=str(users), opts=opts, **arguments))


def test_the_saved_config_repeats_the_run(tmp_path, small_scenes):
    """The config of the command line has no AUTO left, and read again it is the same."""
    arguments = {"num_gpus": 0, "num_machines": 1, "resume": False, "eval_only": False}
    config = str(ROOT / "configs/own_data_mask_rcnn_R50_FPN_mabn.yaml")
    opts = ["DATASETS.TRAIN", "('small_scenes_train',)", "OUTPUT_DIR", str(tmp_path / "run")]
    opts += map(str, DIGITS)
    first = setup_config(SimpleNamespace(config_file=config, opts=opts, **arguments))
    assert first.SOLVER.MAX_ITER == 60 * 24 / 8
    saved = tmp_path / "config.yaml"
    saved.write_text(first.dump())
    again = setup_config(SimpleNamespace(config_file=str(saved), opts=[], **arguments))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(first.dump())
