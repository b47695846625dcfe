"""What Detectron2's users do around a norm does to MABN and BRN what it does to BatchNorm."""

import copy

import pytest
import torch
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.utils.events import EventStorage
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from inputs import training_inputs
from mabn_d2.layers import BatchRenorm2d, MABN2d
from mabn_d2.solver import build_optimizer


@pytest.fixture(params=["MABN", "BRN"])
def cfg(digits_cfg, request):
    model = digits_cfg.MODEL
    for node in (model.RESNETS, model.FPN, model.ROI_BOX_HEAD, model.ROI_MASK_HEAD):
        node.NORM = request.param
    model.BACKBONE.NAME = "build_resnet_fpn_backbone"
    model.RESNETS.DEPTH = 18
    model.RESNETS.STEM_OUT_CHANNELS = model.RESNETS.RES2_OUT_CHANNELS = 64
    model.BRN.WARMUP_ITERS = 0
    return digits_cfg


def losses(model, inputs):
    torch.manual_seed(0)  # anchors and RoIs are sampled
    with EventStorage():
        return sum(model.train()(inputs).values())


def norms(module):
    return [m for m in module.modules() if isinstance(m, (BatchRenorm2d, MABN2d))]


def test_frozen_stages(cfg):
    cfg.MODEL.BACKBONE.FREEZE_AT = 3
    model = build_model(cfg)
    frozen = [model.backbone.bottom_up.stem, model.backbone.bottom_up.res3]
    before = [copy.deepcopy(part.state_dict()) for part in frozen]
    for _ in range(2):
        loss = losses(model, training_inputs(96, 96))
        loss.backward()
    for part, state in zip(frozen, before, strict=True):
        # Detectron2 turns BatchNorm into FrozenBN here, and other norms it leaves to themselves.
        assert all(torch.equal(value, state[key]) for key, value in part.state_dict().items())
        assert all(p.grad is None for p in part.parameters())
    assert all(n.running_var.sub(1).any() for n in norms(model.backbone.bottom_up.res4))


def test_autocast_in_bfloat16(cfg):
    model = build_model(cfg)
    inputs = training_inputs(96, 96)
    wide, narrow = model, copy.deepcopy(model)
    loss = losses(wide, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        low = losses(narrow, inputs)
        inner = narrow.backbone(torch.randn(2, 3, 64, 64))
    assert all(f.dtype == torch.bfloat16 for f in inner.values())
    low.backward()
    assert low.item() == pytest.approx(loss.item(), rel=0.05)
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in narrow.parameters()
    )
    assert all(
        b.dtype == torch.float32
        for n in norms(narrow)
        for b in n.buffers()
        if b.is_floating_point()
    )


def test_clipped_gradients(cfg):
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, "full_model", 1e-3
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    losses(model, training_inputs(96, 96)).backward()
    optimizer.step()
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert total.item() == pytest.approx(1e-3, rel=2e-3)
    assert all(n.weight.grad.any() for n in norms(model.backbone))


def test_moving_average_of_the_model(cfg):
    model = build_model(cfg)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    stem = model.backbone.bottom_up.stem.conv1
    with torch.no_grad():
        stem.norm.weight.fill_(3)
    average.update_parameters(model)  # the first copies
    with torch.no_grad():
        stem.norm.weight.fill_(5)
        stem.norm.running_var.fill_(9)
    average.update_parameters(model)
    other = average.module.backbone.bottom_up.stem.conv1
    assert type(other) is type(stem) and type(other.norm) is type(stem.norm)
    assert (other.norm.weight == 4).all() and (other.norm.running_var == 5).all()
    with torch.no_grad():
        found = average.eval()(training_inputs(96, 96))
    assert len(found) == 2


def test_test_time_augmentation(cfg):
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = (64, 96), 128
    model = build_model(cfg).eval()
    before = copy.deepcopy(model.state_dict())
    record = {k: v for k, v in training_inputs(96, 96)[0].items() if k != "instances"}
    with torch.no_grad():
        found = GeneralizedRCNNWithTTA(cfg, model)([record])[0]["instances"]
    assert found.image_size == (96, 96) and found.has("pred_masks")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
