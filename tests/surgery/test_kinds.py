"""Which norms and convolutions are converted, and what is refused rather than lost."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.ops import DeformConv2d

from detectors import randomized
from mabn_d2 import MABN2d, convert_mabn, fold_mabn, fuse_relu, unfuse_relu
from mabn_d2.layers import CenConvTranspose2d, MABNAct2d, SplitMABNAct2d


def images():
    return torch.randn(2, 3, 12, 12)


class NormReLU(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class NormWithParameter(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.slope = nn.Parameter(torch.ones(()))


class Renamed(nn.BatchNorm2d):
    """Adds nothing."""


class NormAndOtherDrop(nn.BatchNorm2d):
    """Has timm's attributes, and does something else with them."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return super().forward(self.act(self.drop(x)))


def timm_norm(**kwargs):
    from timm.layers import BatchNormAct2d

    return lambda channels: BatchNormAct2d(channels, **kwargs)


@pytest.mark.parametrize("kind, why", [
    (NormReLU, "NormReLU has a forward of its own"),
    (NormWithParameter, "NormWithParameter has slope"),
    (NormAndOtherDrop, "NormAndOtherDrop has a forward of its own"),
    (lambda c: nn.LazyBatchNorm2d(), "has not seen an input yet"),
])  # fmt: skip
def test_norms_that_would_lose_something(kind, why):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4))
    before = type(net[1])
    with pytest.raises(ValueError, match=f"1: .*{why}"):
        convert_mabn(net)
    assert type(net[1]) is before and type(net[0]) is nn.Conv2d


def test_a_subclass_that_adds_nothing():
    net = convert_mabn(nn.Sequential(nn.Conv2d(3, 4, 3), Renamed(4)))
    assert type(net[1]) is MABN2d


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.PReLU, None])
def test_norm_with_activation(act, split):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), timm_norm(act_layer=act, apply_act=act is not None)(4))
    stock = copy.deepcopy(net)
    convert_mabn(net, split_batch=split, batch_size=1, simulated_batch_size=2)
    assert type(net[1]) is (SplitMABNAct2d if split else MABNAct2d)
    x = images()
    bare = MABN2d(4, split_batch=split, batch_size=1, simulated_batch_size=2)
    torch.testing.assert_close(net(x), net[1].act(bare(net[0](x))))
    model = randomized(net)
    parameters = {name for name, _ in stock.named_parameters()}
    assert {name for name, _ in model.named_parameters()} == parameters
    fused = fuse_relu(copy.deepcopy(model))
    assert (fused[1].activation == "relu") == (act is nn.ReLU)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
        assert str(unfuse_relu(copy.deepcopy(fused))) == str(model)
        for into in ("frozen_bn", "batch_norm", "conv"):
            for source in (model, fused):
                folded = fold_mabn(source, into)
                exact = {"rtol": 1e-5, "atol": 1e-6} if into == "conv" else {"rtol": 0, "atol": 0}
                torch.testing.assert_close(folded(x), model(x), **exact)
        folded = fold_mabn(fused, "batch_norm")
        assert type(folded[1]) is type(stock[1])
        stock.load_state_dict(folded.state_dict(), strict=True)
        torch.testing.assert_close(stock.eval()(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("change", [
    weight_norm,
    spectral_norm,
    lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
])  # fmt: skip
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_something_else_computes(change, after):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    if after:
        change(convert_mabn(net)[0])
        with pytest.raises(ValueError, match="weight of .* is computed by"):
            fold_mabn(net.eval())
    else:
        change(net[0])
        with pytest.raises(ValueError, match="0?1: the weight of .*Conv2d is computed by"):
            convert_mabn(net)


def test_a_pruned_norm():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    prune.l1_unstructured(net[1], "weight", 0.5)
    with pytest.raises(ValueError, match="1: .*has weight_orig, weight_mask"):
        convert_mabn(net)


def same_conv(**kwargs):
    from timm.layers.conv2d_same import Conv2dSame

    return Conv2dSame(3, 4, 3, **kwargs)


def std_conv(**kwargs):
    from timm.layers import StdConv2d

    return StdConv2d(3, 4, 3, **kwargs)


class Deformable(nn.Module):
    def __init__(self, conv=None):
        super().__init__()
        self.conv, self.bn = conv or DeformConv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        offset = (
            torch.linspace(-1, 1, 18 * 10 * 10).reshape(1, 18, 10, 10).expand(len(x), -1, -1, -1)
        )
        return self.bn(self.conv(x, offset))


@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)),
    lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 2, groups=3), nn.BatchNorm2d(6)),
    lambda: nn.Sequential(same_conv(stride=2), nn.BatchNorm2d(4)),
    lambda: nn.Sequential(std_conv(), nn.BatchNorm2d(4)),
    Deformable,
])  # fmt: skip
def test_other_convolutions(make):
    stock = make()
    net = convert_mabn(copy.deepcopy(stock))
    assert {k for k, _ in net.named_parameters()} == {k for k, _ in stock.named_parameters()}
    x = images()
    net(x).square().mean().backward()
    conv = next(net.children())
    # The mean of a filter gets no gradient, and does not change the output.
    before = conv(x) if make is not Deformable else net(x)
    shift = torch.randn(conv.out_channels)
    dims = (1, 2, 3)
    if isinstance(conv, CenConvTranspose2d):
        shift = shift.reshape(conv.groups, -1).repeat_interleave(conv.in_channels // conv.groups, 0)
        gradient = conv.weight.grad.unflatten(0, (conv.groups, -1)).mean((1, 3, 4))
        conv.weight.data += shift[:, :, None, None]
    else:
        gradient = conv.weight.grad.mean(dims)
        conv.weight.data += shift[:, None, None, None]
    assert gradient.abs().max() < 1e-6
    if make is not Deformable:
        torch.testing.assert_close(conv(x), before, rtol=1e-4, atol=1e-5)
    model = randomized(net)
    with torch.no_grad():
        for into in ("frozen_bn", "batch_norm", "conv"):
            if into == "conv" and "Std" in type(conv).__name__:
                with pytest.raises(ValueError, match="standardizes its weight"):
                    fold_mabn(model, into)
                continue
            folded = fold_mabn(model, into, example_inputs=x)
            torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
            assert {type(m) for m in folded.modules()} <= {
                *(type(m) for m in stock.modules()), nn.Identity,
                *(type(m) for m in folded.modules() if "Frozen" in type(m).__name__),
            }  # fmt: skip
        stock.load_state_dict(fold_mabn(model, "batch_norm").state_dict(), strict=True)
        torch.testing.assert_close(stock.eval()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "conv", [nn.Linear(3, 4), nn.Conv3d(3, 4, 3), type("Own", (nn.Conv2d,), {})(3, 4, 3)]
)
def test_what_cannot_be_centred(conv):
    with pytest.raises(
        ValueError,
        match=r"1: .*can't be.*use one of torch.nn.modules.conv.Conv2d|1: .*output of .*Linear",
    ):
        convert_mabn(nn.Sequential(conv, nn.BatchNorm2d(4)))


def test_folded_models_script():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), timm_norm()(4))
    net += nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model, x = randomized(fuse_relu(convert_mabn(net))), images()
    model.append(MABN2d(4, activation="relu").eval())
    for into in ("frozen_bn", "conv"):
        if into == "conv":
            del model[-1]
        folded = fold_mabn(model, into)
        torch.testing.assert_close(torch.jit.script(folded)(x), folded(x))
