"""The published configs: every key of the schedule, 69 pairs, a step and an inference."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from inputs import training_inputs
from mabn_d2 import add_mabn_config
from mabn_d2.layers import MABN2d
from mabn_d2.modeling.convolutions import CenNormConv2d
from mabn_d2.solver import build_optimizer
from paths import ROOT


def load(name):
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / name))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.mark.parametrize(
    "name", ["mask_rcnn_R50_FPN_mabn_2x.yaml", "scratch_mask_rcnn_R50_FPN_mabn_2x.yaml"]
)
def test_published_schedule(name):
    cfg = load(name)
    solver, model = cfg.SOLVER, cfg.MODEL
    assert ("" if "scratch" in name else "weights/R50-wc.pth") == model.WEIGHTS
    assert (solver.STEPS, solver.MAX_ITER) == ((120000, 160000), 180000)
    assert (solver.IMS_PER_BATCH, solver.BASE_LR) == (16, 0.02)
    assert (pytest.approx(1 / 3), 500) == (solver.WARMUP_FACTOR, solver.WARMUP_ITERS)
    assert (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM, solver.WEIGHT_DECAY_BIAS) == (
        1e-4,
        1e-4,
        0.0,
    )
    assert solver.BIAS_LR_FACTOR == 2.0 and cfg.INPUT.MIN_SIZE_TRAIN == (800,)
    assert model.PIXEL_MEAN == [102.9801, 115.9465, 122.7717] and model.PIXEL_STD == [1.0] * 3
    assert model.BACKBONE.FREEZE_AT == 0 and model.RESNETS.STRIDE_IN_1X1
    assert pytest.approx(1 / 9) == model.RPN.SMOOTH_L1_BETA and model.RPN.BOUNDARY_THRESH == 0
    assert model.RPN.POST_NMS_TOPK_TRAIN == 1000
    box, mask = model.ROI_BOX_HEAD, model.ROI_MASK_HEAD
    assert (box.NAME, box.NUM_CONV, box.CONV_DIM, box.NUM_FC, box.FC_DIM, box.SMOOTH_L1_BETA) == (
        "PublishedConvFCHead",
        4,
        256,
        1,
        1024,
        1.0,
    )
    assert mask.NUM_CONV == 4
    for head in (box, mask):
        assert (head.POOLER_TYPE, head.POOLER_SAMPLING_RATIO, head.NORM) == ("ROIAlign", 2, "MABN")
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.DATASETS.TEST == ("coco_2017_val",)
    mabn = model.MABN
    assert (mabn.BATCH_SIZE, mabn.SIMULATED_BATCH_SIZE, mabn.WARMUP_ITERS, mabn.MOMENTUM) == (
        0,
        32,
        100,
        0.98,
    )


def test_full_model_trains_and_infers():
    cfg = load("mask_rcnn_R50_FPN_mabn_2x.yaml")
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.INPUT.MASK_FORMAT = "bitmask"
    model = build_model(cfg)
    pairs = [
        (name, conv)
        for name, conv in model.named_modules()
        if isinstance(getattr(conv, "norm", None), MABN2d)
    ]
    assert len(pairs) == sum(isinstance(m, MABN2d) for m in model.modules()) == 69
    assert all(type(conv) is CenNormConv2d and conv.norm.window == 16 for _, conv in pairs)
    others = [m for m in model.modules() if isinstance(m, nn.Conv2d) and type(m) is CenNormConv2d]
    assert len(others) == 69

    inputs = training_inputs()
    optimizer = build_optimizer(cfg, model)
    with EventStorage():
        losses = model.train()(inputs)
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    before = model.backbone.bottom_up.stem.conv1.weight.detach().clone()
    sum(losses.values()).backward()
    optimizer.step()
    assert not torch.equal(before, model.backbone.bottom_up.stem.conv1.weight)
    assert all(conv.norm.iters == 1 for _, conv in pairs)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with torch.no_grad():
        instances = model.eval()(inputs)[0]["instances"]
    assert instances.image_size == (128, 160) and instances.has("pred_masks")
