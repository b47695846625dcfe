import copy
import logging

import pytest
import torch
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.models import densenet121, resnet18, resnet50
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.feature_extraction import create_feature_extractor

from detectors import narrow_cfg
from inputs import training_inputs
from mabn_d2 import convert_mabn, fold_mabn
from mabn_d2.layers import CenConv2d, MABN2d, PerLevelNorm
from mabn_d2.modeling.norm_table import norm_settings


def kinds(model):
    return {
        kind: sum(type(m) is kind for m in model.modules())
        for kind in (CenConv2d, MABN2d, nn.Conv2d, nn.BatchNorm2d)
    }


def test_torchvision_resnet():
    model = resnet50()
    with torch.no_grad():
        for parameter in model.parameters():  # also norms' weights, which start at 1
            parameter.add_(torch.rand_like(parameter) * 0.1)
    reference = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    assert convert_mabn(model, batch_size=2, simulated_batch_size=8, clip_start=7) is model
    assert kinds(model) == {CenConv2d: 53, MABN2d: 53, nn.Conv2d: 0, nn.BatchNorm2d: 0}
    assert (model.bn1.window, model.bn1.clip_start, model.bn1.training) == (4, 7, True)
    new = dict(model.named_parameters())
    assert all(new[name] is parameter for name, parameter in parameters.items())
    # BatchNorm's mean is that of its output; at zero-centred filters MABN normalizes likewise if
    # the inputs' means are equal over the channels, as in an image of noise.
    for conv in (m for m in reference.modules() if isinstance(m, nn.Conv2d)):
        conv.weight.data -= conv.weight.data.mean((1, 2, 3), keepdim=True)
    x = torch.randn(4, 3, 128, 128)
    stems = [m.bn1(m.conv1(x)) for m in (model, reference)]
    assert (stems[0] - stems[1]).abs().mean() < 0.02 * stems[1].abs().mean()
    model(x[:2, :, :64, :64]).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.bn1.iters == 2 and model.layer4[2].bn3.iters == 1


def test_torchvision_detector():
    model = convert_mabn(
        maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=64, max_size=64)
    )
    assert kinds(model)[MABN2d] == kinds(model)[CenConv2d] == 53
    target = {
        "boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]),
        "labels": torch.tensor([3]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
    }
    losses = model(list(torch.rand(2, 3, 64, 64)), [target, target])
    sum(losses.values()).backward()
    assert model.backbone.body.layer4[2].bn3.weight.grad.isfinite().all()
    with torch.no_grad():
        found = model.eval()([torch.rand(3, 64, 64)])[0]
    assert found.keys() == {"boxes", "labels", "scores", "masks"}


@torch.no_grad()
@pytest.mark.parametrize("into", ["frozen_bn", "conv"])
def test_torchvision_models_fold_to_their_like(into):
    """Converted, given statistics, folded: no layer of MABN is left, and the outputs are the same."""
    backbone, detector = (
        resnet50(),
        maskrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, min_size=64, max_size=64, box_score_thresh=0.0
        ),
    )
    image = torch.rand(2, 3, 64, 64)
    for model, inputs in ((backbone, image), (detector, list(image))):
        convert_mabn(model).eval()
        for norm in (m for m in model.modules() if isinstance(m, MABN2d)):
            norm.running_var.uniform_(0.5, 2)
            norm.bias.normal_(std=0.1)
        folded = fold_mabn(model, into)
        kinds_left = {type(m) for m in folded.modules()}
        assert not kinds_left & {CenConv2d, MABN2d, nn.BatchNorm2d}
        assert (FrozenBatchNorm2d in kinds_left) == (into == "frozen_bn")
        expected, found = model(inputs), folded(inputs)
        if model is backbone:
            assert expected.std() > 1e-3
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
            continue
        for a, b in zip(expected, found, strict=True):
            assert len(a["scores"]) == len(b["scores"]) > 5 and torch.equal(
                a["labels"], b["labels"]
            )
            for name in ("scores", "boxes", "masks"):
                torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-3)


def test_detectron2s_mask_rcnn():
    """A whole one, built with BatchNorm, is the one that is built with MABN."""
    cfg = narrow_cfg()
    wanted = build_model(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_any_norm_resnet_fpn_backbone"
    for node in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        cfg.MODEL[node].NORM = "BN"
    model = build_model(cfg)
    keys = {name for name, _ in model.named_parameters()}
    convert_mabn(model, **norm_settings(cfg))
    assert sum(isinstance(m, MABN2d) for m in model.modules()) == 69
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert {name for name, _ in model.named_parameters()} == keys
    assert model.state_dict().keys() == wanted.state_dict().keys()
    wanted.load_state_dict(model.state_dict())
    inputs, losses = training_inputs(96, 96), []
    for each in (model, wanted):
        torch.manual_seed(0)
        with EventStorage():
            losses.append(sum(each.train()(inputs).values()))
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_detectron2s_modules():
    frozen = BasicStem(3, 8, norm="BN")
    frozen.freeze()  # makes FrozenBatchNorm2d of it
    net = nn.ModuleDict(
        {
            "stem": frozen,
            "block": BottleneckBlock(8, 16, bottleneck_channels=4, norm="SyncBN").double().eval(),
            "head": nn.Sequential(nn.Conv2d(16, 16, 3), CycleBatchNormList(3, num_features=16)),
        }
    )
    net["block"].conv1.norm.weight.requires_grad_(False)
    net["head"][1][2].running_var.fill_(7)
    nn.init.ones_(net["head"][0].bias)
    convert_mabn(net, eps=1e-3)
    assert type(net["stem"].conv1.norm) is FrozenBatchNorm2d
    norm = net["block"].conv1.norm
    assert type(norm) is MABN2d and norm.eps == 1e-3 and not norm.training
    assert norm.running_var.dtype == torch.float64 and not norm.weight.requires_grad
    levels = net["head"][1]
    assert type(levels) is PerLevelNorm and [n.running_var[0].item() for n in levels] == [1, 1, 7]
    assert not net["head"][0].bias.any()


def test_warns_that_statistics_are_not_its_own(caplog):
    with caplog.at_level(logging.WARNING):
        convert_mabn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert "1 norms are MABN now" in caplog.text and "before evaluating" in caplog.text


def test_mabn_that_is_there_already(caplog):
    """torchvision takes the class; its convolutions are not centred by that."""
    torch.manual_seed(0)
    model = resnet18(norm_layer=MABN2d)
    model.layer1[0].conv1.bias = nn.Parameter(torch.ones(64))
    convert_mabn(model, batch_size=4, simulated_batch_size=8)
    assert kinds(model) == {CenConv2d: 20, MABN2d: 20, nn.Conv2d: 0, nn.BatchNorm2d: 0}
    assert not caplog.text and model.bn1.window == 2 and model.layer1[0].conv1.bias.all()
    model(torch.randn(4, 3, 32, 32))  # which checks the pairs
    assert not model.bn1._forward_pre_hooks and model.bn1.iters == 1
    with pytest.raises(ValueError, match="no BatchNorm among its parts$"):
        convert_mabn(model)
    # A layer whose convolution is not found, alone and beside a BatchNorm.
    alone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), MABN2d(4))
    with pytest.raises(ValueError, match="no BatchNorm among its parts\n2: .*ReLU"):
        convert_mabn(alone)
    convert_mabn(
        nn.ModuleList([model, alone, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))])
    )
    assert "left as they are:\n1.2: its input" in caplog.text and model.bn1.window == 2


# torch 2.4 can't trace DenseNet's layer: there the norm is only known to come first.
TRACES = [int(n) for n in torch.__version__.split(".")[:2]] > [2, 4]
NO_CONVOLUTION = (
    "its input is not .* cat in _DenseLayer.forward"
    if TRACES
    else "nothing stands in front of it in _DenseLayer"
)


@pytest.mark.parametrize(
    "net, message",
    [
        (
            densenet121(),
            f"denselayer1.norm1: {NO_CONVOLUTION}(.|\n)*and \\d+ more norms",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), "2: .*activation.ReLU"),
        (
            nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            ),
            "3: .*BatchNorm2d, which can't be",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), "1: it has no weight"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "0?1: MABN is for 2d"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), "no BatchNorm among its parts"),
    ],
)
def test_errors_leave_the_model_alone(net, message):
    before = kinds(net)
    with pytest.raises(ValueError, match=message):
        convert_mabn(net)
    assert kinds(net) == before
    with pytest.raises(TypeError, match="no argument windows"):
        convert_mabn(net, windows=3)


def test_feature_extractor_of_torchvision():
    """torch.fx leaves the layers whole, and they go on training."""
    model = convert_mabn(resnet18())
    leaves = {"leaf_modules": [MABN2d, CenConv2d]}
    extractor = create_feature_extractor(model, ["layer4"], tracer_kwargs=leaves)
    x = torch.randn(2, 3, 64, 64)
    extractor.train()(x)["layer4"].sum().backward()
    assert model.bn1.iters == 1 and model.conv1.weight.grad is not None
    folded = fold_mabn(model.eval(), "batch_norm")
    wanted = extractor.eval()(x)["layer4"]
    found = create_feature_extractor(folded, ["layer4"])(x)["layer4"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
