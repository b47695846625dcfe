"""surgery/fold.py."""

import copy
import subprocess
import sys

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from detectors import assert_same_instances, narrow_cfg, randomized, scenes
from mabn_d2 import CheckpointError, add_mabn_config, convert_mabn, fold_mabn
from mabn_d2.checkpoint import fold_detector
from mabn_d2.layers import CenConv2d, MABN2d
from mabn_d2.modeling.convolutions import CenNormConv2d
from mabn_d2.modeling.norm import build_model, detectron2_build_model
from paths import ROOT

STOCK = """
import sys
sys.modules["mabn_d2"] = None
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
cfg = get_cfg()
cfg.merge_from_file("stock.yaml")
build_model(cfg).load_state_dict(torch.load("folded.pth"), strict=True)
print(cfg.MODEL.BACKBONE.NAME, cfg.MODEL.ROI_BOX_HEAD.NAME)
"""


def pair(activation=None, bias=True):
    """CenConv2d and MABN2d in sequence, and as one of Detectron2's convolutions."""
    norm = MABN2d(6, activation=activation, eps=1e-3)
    sequence = randomized(nn.Sequential(CenConv2d(4, 6, 3, bias=bias), norm))
    joined = Conv2d(4, 6, 3, bias=bias, norm=norm)
    joined.__class__ = CenNormConv2d
    joined.weight, joined.bias = sequence[0].weight, sequence[0].bias
    return sequence, joined.eval()


@pytest.mark.parametrize("into", ["frozen_bn", "conv"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_layers(into, activation, bias):
    x = torch.randn(2, 4, 9, 9)
    for module in pair(activation, bias):
        before = {name: value.clone() for name, value in module.state_dict().items()}
        folded = fold_mabn(module, into)
        found, expected = folded(x), module(x)
        assert (expected.min() >= 0) == (activation == "relu")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        # The plain formula, so that both can't be wrong.
        plain = module[1] if isinstance(module, nn.Sequential) else module.norm
        conv = module[0] if isinstance(module, nn.Sequential) else module
        weight = conv.weight - conv.weight.mean((1, 2, 3), keepdim=True)
        y = (
            nn.functional.conv2d(x, weight, conv.bias)
            / (plain.running_var + 1e-3).sqrt()[:, None, None]
        )
        y = y * plain.weight[:, None, None] + plain.bias[:, None, None]
        torch.testing.assert_close(found, y.relu() if activation else y, rtol=1e-4, atol=1e-5)
        kinds = [type(layer) for layer in folded.modules()]
        assert not {MABN2d, CenConv2d, CenNormConv2d} & set(kinds)
        assert any(issubclass(k, FrozenBatchNorm2d) for k in kinds) == (into == "frozen_bn")
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])


def test_norms_by_themselves():
    norm = randomized(MABN2d(4))
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(fold_mabn(norm)(x), norm(x))
    alone = nn.Sequential(nn.ReLU(), norm)
    torch.testing.assert_close(fold_mabn(alone)(x), alone(x))
    with pytest.raises(
        ValueError,
        match="no convolution in front to fold(.|\n)*1: its input is the output of .*ReLU",
    ):
        fold_mabn(alone, "conv")
    with pytest.raises(ValueError, match="'bn': use one of frozen_bn, conv, batch_norm"):
        fold_mabn(norm, "bn")


def test_shared_norm_and_other_dtypes():
    sequence, _ = pair()
    heads = nn.ModuleList([sequence, sequence]).double()
    folded = fold_mabn(heads)
    assert folded[0] is folded[1] and type(folded[0][1]) is FrozenBatchNorm2d
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(folded[0](x), heads[0](x))


def test_running_var_that_half_precision_does_not_hold():
    """MABN's stays in float32, as FrozenBatchNorm2d's does; that of nn.BatchNorm2d does not."""
    norm = MABN2d(3).half().eval()
    norm.running_var.fill_(1e5)
    with pytest.raises(ValueError, match="running_var of 1e.05 is more than torch.float16 holds"):
        fold_mabn(norm, "batch_norm")
    assert fold_mabn(norm).running_var.eq(1e5).all()
    assert fold_mabn(norm.bfloat16(), "batch_norm").running_var.isfinite().all()


@torch.no_grad()  # with gradients FrozenBatchNorm2d rounds otherwise
@pytest.mark.parametrize("into", ["frozen_bn", "conv"])
def test_detector(into):
    cfg = narrow_cfg()
    model = randomized(build_model(cfg))
    folded, stock = fold_detector(model, cfg, into)
    assert not any(isinstance(module, MABN2d) for module in folded.modules())
    images = scenes()
    # The scaled filters of "conv" are rounded otherwise, which random weights amplify.
    assert_same_instances(model(images), folded(images), rtol=0 if into == "frozen_bn" else 1e-4)
    assert "MABN" not in stock.dump() and "OPTIMIZER" not in stock.SOLVER


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-3, 1e-7])
@pytest.mark.parametrize("stock_eps", [1e-5, 1e-2])
def test_stock_model_has_its_own_eps(eps, stock_eps):
    """The eps is in no state dict: here it matters for one norm, whose variances are small."""
    cfg = narrow_cfg()
    cfg.MODEL.MABN.EPS = eps
    model = randomized(build_model(cfg))
    small = model.backbone.bottom_up.res2[0].conv2.norm
    small.running_var.copy_(torch.tensor([0.0, 1e-8, 1e-4, 1.0]))
    folded, stock = fold_detector(model, cfg)
    plain = detectron2_build_model(stock).eval()
    plain.load_state_dict(folded.state_dict(), strict=True)

    converted = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=stock_eps))
    net = randomized(convert_mabn(copy.deepcopy(converted), eps=eps))
    net[1].running_var.copy_(small.running_var)
    converted.load_state_dict(fold_mabn(net, "batch_norm").state_dict(), strict=True)

    x = torch.randn(1, 3, 32, 32)
    for name, expected in model.backbone(x).items():
        torch.testing.assert_close(plain.backbone(x)[name], expected, rtol=1e-4, atol=1e-4)
    for found in (converted.eval(), fold_mabn(net), fold_mabn(net, "batch_norm")):
        assert found[1].eps == stock_eps and found[1].running_var.min() >= 0
        torch.testing.assert_close(found(x), net(x), rtol=1e-5, atol=1e-5 * net(x).abs().max())
    net[1].eps = stock_eps
    assert torch.equal(fold_mabn(net)(x), net(x))


@torch.no_grad()
@pytest.mark.parametrize("into", ["frozen_bn", "conv"])
def test_statistics_of_each_level(into, caplog):
    """RetinaNet's head: strict keys are `fold_detector`'s own check; here the values."""
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/retinanet_R50_FPN_mabn_2x.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.MABN.EPS = 1e-3 if into == "conv" else 1e-7
    model = randomized(build_model(cfg))
    folded, stock = fold_detector(model, cfg, into)
    assert stock.MODEL.RETINANET.NORM == "BN" and "smaller outputs" not in caplog.text
    assert {m.eps for m in folded.head.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    features = [torch.randn(1, 256, size, size) for size in (16, 8, 4, 2, 1)]
    for found, expected in zip(folded.head(features), model.head(features), strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    model.head.cls_subnet[1][0].running_var[:7] = 0
    fold_mabn(model.head.cls_subnet)
    assert caplog.text.count("smaller outputs in 7 channels") == (into == "frozen_bn")


@torch.no_grad()
@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_rounding_is_all_that_differs(dtype, error):
    backbone = randomized(build_model(narrow_cfg())).backbone.to(dtype)
    x = torch.randn(1, 3, 64, 96, dtype=dtype)
    found, expected = fold_mabn(backbone, "conv")(x), backbone(x)
    for name, value in expected.items():
        assert (found[name] - value).norm() < error * value.norm(), name


def test_detector_that_stock_detectron2_does_not_build():
    cfg = narrow_cfg(DEPTH=18, RES2_OUT_CHANNELS=16)
    with pytest.raises(CheckpointError, match="RES2_OUT_CHANNELS = 64"):
        fold_detector(build_model(cfg), cfg)


@pytest.mark.parametrize("backbone", ["mabn", "any_norm"])
def test_a_process_without_the_plugin_builds_it(tmp_path, backbone):
    cfg = narrow_cfg()
    cfg.MODEL.BACKBONE.NAME = f"build_{backbone}_resnet_fpn_backbone"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "PublishedConvFCHead"
    folded, stock = fold_detector(build_model(cfg), cfg)
    (tmp_path / "stock.yaml").write_text(stock.dump())
    torch.save(folded.state_dict(), tmp_path / "folded.pth")
    done = subprocess.run(
        [sys.executable, "-c", STOCK], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == ["build_resnet_fpn_backbone", "FastRCNNConvFCHead"], done.stderr
