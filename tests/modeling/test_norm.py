import copy
import os
import pickle
import subprocess
import sys

import detectron2.layers
import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm, get_norm
from detectron2.layers.aspp import ASPP
from detectron2.modeling import build_model
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import nn

import mabn_d2
from mabn_d2.layers import BatchRenorm2d, CenConv2d, MABN2d
from mabn_d2.modeling.convolutions import CenNormConv2d
from mabn_d2.modeling.norm import build_model as extended_build_model
from mabn_d2.modeling.norm import detectron2_get_norm
from paths import ROOT


def test_every_module_holds_the_extended_function():
    modules = [m for name, m in sys.modules.items() if name.startswith("detectron2.")]
    holders = [m for m in modules if "get_norm" in vars(m)]
    names = {m.__name__ for m in holders}
    assert {
        "detectron2.layers",
        "detectron2.layers.batch_norm",
        "detectron2.layers.aspp",
        "detectron2.modeling.backbone.fpn",
        "detectron2.modeling.backbone.resnet",
        "detectron2.modeling.backbone.regnet",
        "detectron2.modeling.roi_heads.box_head",
        "detectron2.modeling.roi_heads.mask_head",
    } <= names
    for module in holders:
        assert isinstance(module.get_norm("MABN", 4), MABN2d), module.__name__
    assert build_model is extended_build_model


@pytest.mark.parametrize(
    "name, kind",
    [
        ("BN", nn.BatchNorm2d),
        ("SyncBN", nn.SyncBatchNorm),
        ("nnSyncBN", nn.SyncBatchNorm),
        ("naiveSyncBN", NaiveSyncBatchNorm),
        ("GN", nn.GroupNorm),
        ("FrozenBN", FrozenBatchNorm2d),
    ],
)
def test_other_norms_are_detectron2s(name, kind):
    stem = BasicStem(3, 32, norm=name)
    assert type(stem.conv1.norm) is type(detectron2_get_norm(name, 32)) is kind
    assert type(stem.conv1) is Conv2d  # not centred


def test_no_norm_and_unknown_ones():
    assert get_norm("", 4) is None and get_norm(None, 4) is None
    assert isinstance(get_norm(nn.InstanceNorm2d, 4), nn.InstanceNorm2d)
    with pytest.raises(KeyError, match="unknown norm .*MABM.*: use .*MABN"):
        get_norm("MABM", 4)


def test_attached_to_detectron2s_convolution():
    conv = Conv2d(3, 4, 3, padding=1, bias=False, norm=get_norm("MABN", 4))
    plain = Conv2d(3, 4, 3, padding=1, bias=False, norm=nn.BatchNorm2d(4))
    assert type(conv) is CenNormConv2d and type(plain) is Conv2d
    assert list(conv.state_dict())[:3] == list(plain.state_dict())[:3]
    x = torch.randn(2, 3, 5, 5)
    weight = conv.weight - conv.weight.mean((1, 2, 3), keepdim=True)
    z = torch.nn.functional.conv2d(x, weight, padding=1)
    expected = z / (z.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_centred(duplicate):
    stem = BasicStem(3, 4, norm="MABN")
    other = duplicate(stem)
    assert type(other.conv1) is CenNormConv2d
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(other(x), stem(x))


def test_behind_a_plain_convolution():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), get_norm("MABN", 4), nn.ReLU())
    assert type(net[0]) is CenConv2d
    net(torch.randn(1, 3, 8, 8))


def test_blocks_of_other_modules():
    block = BottleneckBlock(8, 16, bottleneck_channels=4, norm="MABN")
    aspp = ASPP(8, 8, [2, 4, 6], norm="MABN", activation=nn.ReLU(), pool_kernel_size=None)
    for module in (block, aspp):
        convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        norms = [m for m in module.modules() if isinstance(m, MABN2d)]
        assert len(norms) >= 4 and {type(c) for c in convs if getattr(c, "norm", 0)} == {
            CenNormConv2d
        }


def test_no_convolution_is_an_error():
    lonely = get_norm("MABN", 4)
    with pytest.raises(RuntimeError, match="no convolution to centre"):
        lonely(torch.randn(1, 4, 2, 2))
    with pytest.raises(TypeError, match="Conv3d"):
        nn.Sequential(nn.Conv3d(3, 4, 2), get_norm("MABN", 4))
    with pytest.raises(TypeError, match="Linear"):
        nn.Sequential(nn.Linear(4, 4), get_norm("MABN", 4))
    with pytest.raises(ValueError, match="8 channels stands behind"):
        nn.Sequential(nn.Conv2d(3, 4, 2), get_norm("MABN", 8))
    with pytest.raises(ValueError, match="one element"):
        nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), get_norm("MABN", 4))


def test_batch_renorm_needs_no_centring():
    stem = BasicStem(3, 4, norm="BRN")
    assert type(stem.conv1) is Conv2d and type(stem.conv1.norm) is BatchRenorm2d


def test_unpaired_layer_in_a_model_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = get_norm("MABN", 4)

    with pytest.raises(ValueError, match="first.norm"):
        mabn_d2.configure_mabn(nn.ModuleDict({"first": Net()}))


class Block(nn.Module):
    """Registers a norm behind a convolution, and runs something between them or not."""

    def __init__(self, between):
        super().__init__()
        self.conv, self.norm, self.between = nn.Conv2d(3, 4, 3), get_norm("MABN", 4), between

    def forward(self, x):
        return self.norm(self.between(self.conv(x)))


def test_first_training_forward_checks_pairs_by_registration():
    x = torch.randn(2, 3, 8, 8)
    good = mabn_d2.configure_mabn(Block(torch.Tensor.contiguous))
    good(x)
    assert not good.norm._forward_pre_hooks
    with pytest.raises(
        ValueError, match="input of norm in Block is not the output of conv in Block"
    ):
        Block(torch.relu)(x)
    stem = BasicStem(3, 4, norm="MABN")  # whose convolution holds the norm: no doubt
    assert not stem.conv1.norm._forward_pre_hooks and not stem.conv1._forward_hooks


@pytest.mark.parametrize(
    "norm", [MABN2d, lambda c: MABN2d(c, split_batch=True), lambda c: get_norm("MABN", c)]
)
def test_norms_from_a_function_are_those_from_the_name(norm):
    block = BottleneckBlock(8, 16, bottleneck_channels=4, norm=norm)
    named = BottleneckBlock(8, 16, bottleneck_channels=4, norm="MABN")
    mabn_d2.configure_mabn(block, split_batch=False)
    assert str(block) == str(named) and isinstance(block.conv1, CenNormConv2d)
    named.load_state_dict(block.state_dict(), strict=True)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x), named(x))
    with pytest.raises(ValueError, match="0 in .*ModuleList"):
        mabn_d2.configure_mabn(nn.ModuleList([get_norm(norm, 4)]))


def test_layers_made_directly_are_left_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), MABN2d(4))
    assert type(net[0]) is nn.Conv2d
    assert detectron2.layers.Conv2d is Conv2d


def test_unmodified_script_takes_the_plugin_from_the_environment():
    """Detectron2's documented hook; the import comes in the midst of Detectron2's own."""
    code = (
        "from detectron2.modeling import BACKBONE_REGISTRY, build_model\n"
        "from detectron2.modeling.backbone.resnet import get_norm\n"
        "assert type(get_norm('MABN', 4)).__name__ == 'MABN2d'\n"
        "assert 'build_mabn_resnet_fpn_backbone' in BACKBONE_REGISTRY\n"
        "assert build_model._stock is not build_model\n"
    )
    environment = {**os.environ, "DETECTRON2_ENV_MODULE": "mabn_d2", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
