"""Typos and numbers out of range, in keys that Detectron2 looks up late: one line before anything."""

import logging
from types import SimpleNamespace

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY

from mabn_d2 import add_mabn_config
from mabn_d2.engine import ConfigError, Trainer, check_config, setup_config
from mabn_d2.engine.model_check import build_without_data
from mabn_d2.engine.schedule import log_schedule
from mabn_d2.engine.value_check import check_values
from mabn_d2.modeling.backbone import build_mabn_resnet_fpn_backbone
from mabn_d2.modeling.norm import build_model
from paths import ROOT


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.META_ARCHITECTURE", "GeneralisedRCNN", "did you mean GeneralizedRCNN"),
        ("MODEL.BACKBONE.NAME", "build_mabn_resnet_fpn", "did you mean build_mabn_resnet_fpn_back"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RPM", "did you mean RPN"),
        ("MODEL.RPN.HEAD_NAME", "StandardRPN", "did you mean StandardRPNHead"),
        ("MODEL.ROI_HEADS.NAME", "StandardRoIHeads", "did you mean StandardROIHeads"),
        ("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFChead", "did you mean FastRCNNConvFCHead"),
        (
            "MODEL.ROI_MASK_HEAD.NAME",
            "x",
            "MODEL.ROI_MASK_HEAD.NAME is 'x', which is not registered",
        ),
        ("MODEL.ANCHOR_GENERATOR.NAME", "Default", "DefaultAnchorGenerator"),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosine", "did you mean WarmupCosineLR"),
        ("INPUT.FORMAT", "YUV-BT.601", "INPUT.FORMAT is 'YUV-BT.601'"),
        ("INPUT.MIN_SIZE_TRAIN", (), "INPUT.MIN_SIZE_TRAIN is empty"),
        ("SOLVER.CHECKPOINTS_TO_KEEP", -1, "give a whole number, at least 0"),
        ("SEED", 2**40, r"give a number below 2\*\*32"),
        ("MODEL.RPN.BBOX_REG_WEIGHTS", (1.0, 1.0), "give four numbers"),
        ("TEST.EXPECTED_RESULTS", ["x"], r"TEST.EXPECTED_RESULTS has 'x': give \[task, metric"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "ful_model", "did you mean full_model"),
        ("SOLVER.WARMUP_METHOD", "cosine", "linear, constant"),
        ("MODEL.RESNETS.DEPTH", 51, "MODEL.RESNETS.DEPTH is 51.*50, 101"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[-32]], "each above 0"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64]], "has 2 lists for the 5 feature maps"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[]], "at least one number"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "RoIAlign", "did you mean ROIAlign"),
        ("INPUT.FORMAT", "bgr", "INPUT.FORMAT is 'bgr'"),
        ("INPUT.MASK_FORMAT", "polygons", "did you mean polygon"),
        ("SOLVER.BASE_LR", 0.0, "SOLVER.BASE_LR is 0.0: give a number above 0"),
        ("SOLVER.BASE_LR", float("nan"), "SOLVER.BASE_LR is nan"),
        ("SOLVER.WEIGHT_DECAY", -1.0, "SOLVER.WEIGHT_DECAY is -1.0: give a number at least 0"),
        ("SOLVER.MAX_ITER", 0, "SOLVER.MAX_ITER is 0: give a whole number above 0"),
        ("SOLVER.CHECKPOINT_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD is 0"),
        ("SOLVER.STEPS", (300, 200), "rising iterations"),
        ("SOLVER.BASE_LR_END", 5.0, "SOLVER.BASE_LR_END is 5.0, more than SOLVER.BASE_LR"),
        ("SOLVER.NUM_DECAYS", 0, "SOLVER.NUM_DECAYS is 0: give a whole number above 0"),
        ("SOLVER.REFERENCE_WORLD_SIZE", 3, "does not divide SOLVER.IMS_PER_BATCH 2"),
        ("SOLVER.REFERENCE_WORLD_SIZE", -1, "REFERENCE_WORLD_SIZE is -1"),
        ("TEST.EVAL_PERIOD", -5, "TEST.EVAL_PERIOD is -5"),
        ("MODEL.BACKBONE.FREEZE_AT", 7, "FREEZE_AT is 7"),
        ("MODEL.PIXEL_STD", [1.0, 0.0, 1.0], "PIXEL_STD"),
        ("MODEL.PIXEL_MEAN", [1.0], "PIXEL_MEAN has 1 numbers"),
        ("MODEL.RPN.NMS_THRESH", 70.0, "between 0 and 1"),
        ("MODEL.DEVICE", "cdua", "MODEL.DEVICE is 'cdua'"),
        ("DATALOADER.NUM_WORKERS", -2, "NUM_WORKERS is -2"),
    ],
)
def test_wrong_values(digits_cfg, key, value, message):
    digits_cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    digits_cfg.merge_from_list([key, value])
    with pytest.raises(ConfigError, match=message) as error:
        check_config(digits_cfg)
    assert "\n" not in str(error.value) and key.rpartition(".")[0] in str(error.value)


@pytest.mark.parametrize("steps", [(0, 2), (2, 4)])
def test_steps_outside_of_the_training(digits_cfg, steps):
    digits_cfg.SOLVER.LR_SCHEDULER_NAME, digits_cfg.SOLVER.STEPS = "WarmupMultiStepLR", steps
    with pytest.raises(ConfigError, match="SOLVER.STEPS is .* SOLVER.MAX_ITER 4: .*above 0 and"):
        check_values(digits_cfg)


def test_a_script_of_ones_own_gets_the_same_line(digits_cfg):
    digits_cfg.SOLVER.LR_SCHEDULER_NAME = "Cosine"
    with pytest.raises(ConfigError, match="SOLVER.LR_SCHEDULER_NAME is 'Cosine'"):
        Trainer(digits_cfg)
    for check in (Trainer, check_config):
        with pytest.raises(ConfigError, match="call mabn_d2.add_mabn_config.cfg. before merging"):
            check(get_cfg())


def test_values_of_ones_own_trainer(digits_cfg):
    """As long as its methods read them."""

    class Poly(Trainer):
        @classmethod
        def build_lr_scheduler(cls, cfg, optimizer):
            assert cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPolyLR"
            return torch.optim.lr_scheduler.PolynomialLR(optimizer, cfg.SOLVER.MAX_ITER)

    class Adam(Poly):
        @classmethod
        def build_optimizer(cls, cfg, model):
            return torch.optim.Adam(model.parameters(), cfg.SOLVER.BASE_LR)

    digits_cfg.SOLVER.LR_SCHEDULER_NAME, digits_cfg.SOLVER.OPTIMIZER = "WarmupPolyLR", "ADAM"
    digits_cfg.SOLVER.MAX_ITER, digits_cfg.DATASETS.TEST = 1, ()
    with pytest.raises(ConfigError, match="SOLVER.OPTIMIZER is 'ADAM'"):
        Poly(digits_cfg)
    trainer = Adam(digits_cfg)
    trainer.train()
    assert isinstance(trainer.optimizer, torch.optim.Adam)
    assert trainer.optimizer.param_groups[0]["lr"] < digits_cfg.SOLVER.BASE_LR


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.FPN.OUT_CHANNELS", 48, "MODEL.FPN.OUT_CHANNELS is 48, which 32 does not divide"),
        ("MODEL.ROI_MASK_HEAD.CONV_DIM", 20, "MODEL.ROI_MASK_HEAD.CONV_DIM is 20"),
        ("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.STEM_OUT_CHANNELS is 8"),
        ("MODEL.GN.NUM_GROUPS", 0, "MODEL.GN.NUM_GROUPS is 0: give a whole number above 0"),
        (
            "MODEL.GN.NUM_GROUPS",
            12,
            "OUT_CHANNELS is 32, which 96 does not divide.*makes 12 groups",
        ),
    ],
)
def test_widths_of_group_norm(digits_cfg, key, value, message):
    widths = ["MODEL.FPN.OUT_CHANNELS", "MODEL.ROI_BOX_HEAD.CONV_DIM", "MODEL.ROI_MASK_HEAD.CONV_DIM",
              "MODEL.RESNETS.STEM_OUT_CHANNELS", "MODEL.RESNETS.RES2_OUT_CHANNELS"]  # fmt: skip
    for name in widths:
        digits_cfg.merge_from_list([name, 32])
    for node in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        digits_cfg.MODEL[node].NORM = "GN"
    check_config(digits_cfg)
    digits_cfg.MODEL.GN.NUM_GROUPS = 8
    check_config(digits_cfg)
    digits_cfg.merge_from_list([key, value])
    with pytest.raises(ConfigError, match=message):
        check_config(digits_cfg)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.RPN.IN_FEATURES", ["p2", "p9"], r"MODEL.RPN.IN_FEATURES has 'p9'"),
        ("MODEL.RESNETS.OUT_FEATURES", ["res9"], "no model can be built"),
        ("MODEL.RESNETS.NUM_GROUPS", 3, "no model can be built"),
        ("MODEL.ROI_MASK_HEAD.NUM_CONV", 0, None),
    ],
)
def test_what_only_building_shows(digits_cfg, key, value, message):
    digits_cfg.merge_from_list([key, value])
    if message is None:
        assert build_without_data(digits_cfg) is not None
        return
    with pytest.raises(ConfigError, match=message) as error:
        build_without_data(digits_cfg)
    assert "\n" not in str(error.value)


def test_norms_in_whose_place_mabn_comes(digits_cfg, tmp_path, caplog):
    """The defaults that the published config leaves are MABN; a user who asks for them is told."""
    digits_cfg.MODEL.BACKBONE.NAME = "build_mabn_resnet_fpn_backbone"
    digits_cfg.MODEL.RESNETS.NORM, digits_cfg.MODEL.FPN.NORM = "FrozenBN", ""
    saved, path = tmp_path / "config.yaml", tmp_path / "users.yaml"
    saved.write_text(digits_cfg.dump())

    def setup(file, *opts, resume=False):
        arguments = {"num_gpus": 0, "num_machines": 1, "resume": resume, "eval_only": False}
        return setup_config(SimpleNamespace(config_file=str(file), opts=list(opts), **arguments))

    with caplog.at_level("INFO"):
        build_model(setup(saved))
    assert "RESNETS.NORM is 'FrozenBN', Detectron2's default, in whose place" in caplog.text
    assert "FPN.NORM is '', Detectron2's default, in whose place" in caplog.text
    for node in ("RESNETS: {NORM: FrozenBN}", "FPN: {NORM: ''}"):
        path.write_text(f"_BASE_: config.yaml\nMODEL: {{{node}}}\n")
        with pytest.raises(ConfigError, match='set it to "MABN", or set .*build_any_norm_resnet'):
            setup(path)
        setup(path, resume=True)
        setup(path, "MODEL.BACKBONE.NAME", "build_any_norm_resnet_fpn_backbone")
    with pytest.raises(ConfigError, match="MODEL.RESNETS.NORM is 'FrozenBN', which build_mabn_"):
        setup(saved, "MODEL.RESNETS.NORM", "FrozenBN")
    setup(path, "MODEL.FPN.NORM", "MABN")


def test_a_model_that_needs_data(digits_cfg):
    def build_with_drop_rates(cfg, input_shape):
        rates = torch.linspace(0, 1, 4)
        return build_mabn_resnet_fpn_backbone(cfg, input_shape) if rates[3].item() == 1 else None

    digits_cfg.MODEL.BACKBONE.NAME = build_with_drop_rates.__name__
    BACKBONE_REGISTRY.register(build_with_drop_rates)
    try:
        assert build_without_data(digits_cfg).backbone.bottom_up.stem.conv1.weight.is_cpu
        digits_cfg.MODEL.RPN.IN_FEATURES = ["p2", "p9"]
        with pytest.raises(ConfigError, match=r"MODEL.RPN.IN_FEATURES has 'p9'"):
            build_without_data(digits_cfg)
    finally:
        del BACKBONE_REGISTRY._obj_map[build_with_drop_rates.__name__]


@pytest.mark.parametrize("warmup, start, said", [
    (10, 10, "MODEL.MABN.WARMUP_ITERS is 10 and SOLVER.MAX_ITER 10"),
    (5, 10, "MODEL.MABN.CLIP_START is 10 and SOLVER.MAX_ITER 10"),
    (5, 9, ""),
])  # fmt: skip
def test_averages_that_never_start(digits_cfg, caplog, warmup, start, said):
    digits_cfg.SOLVER.MAX_ITER = 10
    digits_cfg.MODEL.MABN.WARMUP_ITERS, digits_cfg.MODEL.MABN.CLIP_START = warmup, start
    caplog.set_level(logging.WARNING)
    check_values(digits_cfg)
    lines = [r.getMessage() for r in caplog.records if "MODEL.MABN" in r.getMessage()]
    assert len(lines) == bool(said) and said in " ".join(lines)
    caplog.clear()
    check_values(digits_cfg, train=False)
    for node in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        digits_cfg.MODEL[node].NORM = "GN"
        digits_cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = digits_cfg.MODEL.FPN.OUT_CHANNELS = 32
    assert not caplog.records


@pytest.mark.parametrize(
    "warmup, r_max, said",
    [(10, 10, "BRN.WARMUP_ITERS is 10"), (9, 10, "BRN.R_MAX_ITER is 10"), (9, 9, "")],
)
def test_batch_renorm_that_never_starts(digits_cfg, caplog, warmup, r_max, said):
    digits_cfg.SOLVER.MAX_ITER, digits_cfg.SOLVER.WARMUP_ITERS = 10, 0
    for node in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        digits_cfg.MODEL[node].NORM = "BRN"
    brn = digits_cfg.MODEL.BRN
    brn.WARMUP_ITERS, brn.R_MAX_ITER, brn.D_MAX_ITER = warmup, r_max, 9
    check_values(digits_cfg)
    assert len(caplog.messages) == bool(said) and said in "".join(caplog.messages)
    caplog.set_level(logging.INFO)
    log_schedule(digits_cfg)
    assert f"MODEL.BRN.R_MAX_ITER {r_max}, " in caplog.text and "MABN" not in caplog.messages[-1]


def test_windows_of_other_images(digits_cfg, caplog):
    """MABN's batch size is not the images of one forward."""
    digits_cfg.SOLVER.MAX_ITER = 3000
    check_config(digits_cfg)
    digits_cfg.MODEL.MABN.BATCH_SIZE = 2
    check_config(digits_cfg)
    assert not caplog.records
    digits_cfg.SOLVER.IMS_PER_BATCH = 8
    check_config(digits_cfg, workers=2)
    assert caplog.messages == [
        "MODEL.MABN.BATCH_SIZE is 2, but one forward has 4 images, so that the windows of 16 forwards "
        "span 64 images, not 32: set MODEL.MABN.BATCH_SIZE 0, the images of one forward"
    ]


@pytest.mark.parametrize("zoo", [
    "COCO-Detection/retinanet_R_50_FPN_1x", "COCO-Detection/faster_rcnn_R_50_C4_1x",
    "COCO-Detection/rpn_R_50_FPN_1x", "COCO-Detection/fast_rcnn_R_50_FPN_1x",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x", "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x", "Misc/mask_rcnn_R_50_FPN_3x_gn", "Misc/semantic_R_50_FPN_1x",
    "Cityscapes/mask_rcnn_R_50_FPN", "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
    "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5", "PascalVOC-Detection/faster_rcnn_R_50_C4",
])  # fmt: skip
def test_the_model_zoo_passes(zoo):
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(f"{zoo}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    check_values(cfg)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda p: p.stem)
def test_our_configs_pass(path):
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(str(path))
    if cfg.SOLVER.MAX_ITER < 0 or cfg.SOLVER.BASE_LR < 0:  # follows from the images
        cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = 1000, 0.01, 10
        cfg.SOLVER.STEPS, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD = (), 0, 100
    check_values(cfg)


@pytest.mark.parametrize(
    "options, message",
    [
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], "give the smallest and the largest size"),
        (
            ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", (100, 96)],
            "give the smallest and the largest size",
        ),
        (["INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [2.0, 2.0]], "shares of the image"),
        (["INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.5]], "shares of the image"),
        (["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute"], "height and width in whole"),
        (
            ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute_range"]
            + ["INPUT.CROP.SIZE", [90, 80]],
            "the smallest and the largest side",
        ),
    ],
)
def test_resizing_and_cropping(digits_cfg, options, message):
    """What would be blamed on the first image."""
    digits_cfg.INPUT.MIN_SIZE_TRAIN = (64, 80, 96)
    digits_cfg.merge_from_list(options)
    with pytest.raises(ConfigError, match=message):
        check_config(digits_cfg)


@pytest.mark.parametrize(
    "kind, size",
    [("relative", [1.0, 0.5]), ("absolute", [64, 64]), ("absolute_range", [32, 64])],
)
def test_crops_that_are_right(digits_cfg, kind, size):
    digits_cfg.INPUT.CROP.ENABLED = True
    digits_cfg.INPUT.CROP.TYPE, digits_cfg.INPUT.CROP.SIZE = kind, size
    check_config(digits_cfg)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("SOLVER.ACCUMULATION_STEPS", 0, "SOLVER.ACCUMULATION_STEPS is 0: use 1"),
        ("SOLVER.IMS_PER_BATCH", 0, "SOLVER.IMS_PER_BATCH is 0: give a whole number above 0"),
        ("SOLVER.EARLY_STOPPING_PATIENCE", -3, "SOLVER.EARLY_STOPPING_PATIENCE is -3"),
        ("TEST.BEST_METRIC", "bbox", "TEST.BEST_METRIC is 'bbox'"),
        ("MODEL.MABN.MOMENTUM", 7.0, "MODEL.MABN: momentum"),
    ],
)
def test_a_trainer_checks_all_settings(digits_cfg, key, value, message):
    digits_cfg.merge_from_list([key, value])
    with pytest.raises(ConfigError, match=message):
        Trainer(digits_cfg)
