"""What convert_mabn and fold_mabn do to the architectures of other libraries.

    python tests/support/architectures.py            # writes docs/architectures.md
    python tests/support/architectures.py timm/dla34  # prints the row of one or several

Each architecture has random weights, and random statistics in its BatchNorms.
"""

import copy
import logging
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from mabn_d2.layers import MABN2d
from mabn_d2.surgery.convert import convert_mabn
from mabn_d2.surgery.convolutions import effective_filters, is_centred
from mabn_d2.surgery.fold import fold_mabn

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"

# Architectures that take seconds are tested with every change, the others by the slow tests.
FAST = """
torchvision/resnet18 torchvision/mobilenet_v2 torchvision/shufflenet_v2_x0_5 torchvision/vgg11_bn
torchvision/convnext_tiny timm/resnet18 timm/regnetx_002 timm/mobilenetv3_small_050
timm/ghostnet_050 timm/lcnet_050 timm/repvgg_a0 smp/Unet:resnet18 smp/Linknet:resnet18 monai/BasicUNet
""".split()
SLOW = """
torchvision/resnet50 torchvision/resnext50_32x4d torchvision/mobilenet_v3_small
torchvision/efficientnet_b0 torchvision/mnasnet0_5 torchvision/googlenet torchvision/inception_v3
torchvision/densenet121 torchvision/regnet_y_400mf torchvision/fcn_resnet50
torchvision/deeplabv3_mobilenet_v3_large torchvision/lraspp_mobilenet_v3_large
timm/resnet26d timm/ecaresnet26t timm/skresnet18 timm/regnety_002 timm/efficientnet_b0
timm/tf_efficientnet_b0 timm/tf_efficientnetv2_b0 timm/mobilenetv2_050
timm/mobilenetv4_conv_small_050 timm/cspdarknet53 timm/dla34 timm/hrnet_w18_small
timm/res2net50_14w_8s timm/fbnetc_100 timm/mixnet_s timm/hardcorenas_a timm/semnasnet_075
timm/rexnet_100 timm/ese_vovnet19b_dw timm/tinynet_e timm/mobileone_s0 timm/levit_128s
timm/dpn48b timm/selecsls42 timm/gernet_s timm/resnetv2_50d timm/resnetv2_50x1_bit
timm/densenet121 timm/xception41
smp/UnetPlusPlus:resnet18 smp/FPN:efficientnet-b0 smp/PAN:resnet18 smp/PSPNet:resnet18
smp/DeepLabV3:resnet18 smp/DeepLabV3Plus:mobilenet_v2 smp/MAnet:resnet18 smp/UPerNet:resnet18
smp/Unet:tu-regnetx_002 smp/Unet:timm-efficientnet-b0
monai/UNet monai/AttentionUnet monai/SegResNet monai/DenseNet121 monai/SEResNet50
monai/FlexibleUNet monai/DynUNet
""".split()
# Arguments of monai's networks, which are for volumes and other norms by default.
MONAI: dict[str, dict[str, Any]] = {
    "BasicUNet": {"in_channels": 3, "out_channels": 2, "norm": "batch"},
    "UNet": {
        "in_channels": 3,
        "out_channels": 2,
        "channels": (8, 16, 32),
        "strides": (2, 2),
        "num_res_units": 1,
        "norm": "batch",
    },
    "AttentionUnet": {
        "in_channels": 3,
        "out_channels": 2,
        "channels": (8, 16, 32),
        "strides": (2, 2),
    },
    "SegResNet": {"in_channels": 3, "out_channels": 2, "norm": "batch"},
    "DenseNet121": {"in_channels": 3, "out_channels": 2},
    "SEResNet50": {"in_channels": 3, "num_classes": 2},
    "FlexibleUNet": {"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0"},
    "DynUNet": {
        "in_channels": 3,
        "out_channels": 2,
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "norm_name": "batch",
    },
}


def build(architecture: str) -> nn.Module:
    """Return an architecture, `library/name`, with random weights and statistics."""
    library, _, name = architecture.partition("/")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "torchvision":
            import torchvision

            model = (
                torchvision.models.get_model(name, weights=None, weights_backbone=None)
                if any(word in name for word in ("fcn", "deeplab", "lraspp"))
                else torchvision.models.get_model(name, weights=None)
            )
        elif library == "timm":
            import timm

            model = timm.create_model(name, pretrained=False)
        elif library == "monai":
            import monai.networks.nets

            model = getattr(monai.networks.nets, name)(spatial_dims=2, **MONAI[name])
        else:
            import segmentation_models_pytorch as smp

            kind, _, encoder = name.partition(":")
            model = getattr(smp, kind)(encoder, encoder_weights=None)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def images(architecture: str) -> torch.Tensor:
    """Return a batch of two, of a size that the architecture takes."""
    sizes = {"inception_v3": 299, "levit_128s": 224, "PAN:resnet18": 128}
    size = sizes.get(architecture.partition("/")[2], 64)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference relative to the largest value."""
    pairs = zip(tensors(found), tensors(expected), strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)


@torch.no_grad()
def reference(stock: nn.Module, model: nn.Module) -> nn.Module:
    """Return `stock` with the centred filters of `model` and BatchNorms with the mean 0."""
    plain = copy.deepcopy(stock)
    parts = dict(plain.named_modules())
    for name, module in model.named_modules():
        if is_centred(module):
            parts[name].weight.copy_(effective_filters(module))
            if module.bias is not None:
                parts[name].bias.zero_()
        if isinstance(module, MABN2d):
            parts[name].running_mean.zero_()
    return plain


def survey(architecture: str) -> dict[str, str]:
    """Convert, train one step, fold and load; return what the table says.

    Raises:
        AssertionError: if an output is wrong.
    """
    stock, x = build(architecture), images(architecture)
    row = {"architecture": architecture, "norms": "", "conversion": "", "folds into conv": ""}
    model, inputs = copy.deepcopy(stock), {}
    try:
        convert_mabn(model)
        row["conversion"] = "yes"
    except ValueError:
        try:
            convert_mabn(model, example_inputs=x)
            row["conversion"] = "with example_inputs"
        except ValueError as error:
            reason = str(error).splitlines()[1]
            row["conversion"] = f"refused: {textwrap.shorten(reason, 160, placeholder=' ...')}"
            return row
    norms = [module for module in model.modules() if isinstance(module, MABN2d)]
    row["norms"] = str(len(norms))
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    with torch.no_grad():
        error = difference(model(x), reference(stock, model)(x))
        assert error < 1e-5, f"differs from BatchNorm behind centred filters by {error}"

    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    loss = sum(t.square().mean() for t in tensors(model.train()(x)))
    loss.backward()
    optimizer.step()
    reached = [norm for norm in norms if norm.iters > 0]  # smp leaves a part of some encoders out
    assert len(reached) > len(norms) / 2
    assert all(norm.weight.grad.isfinite().all() for norm in reached)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        assert difference(fold_mabn(model, "frozen_bn")(x), expected) == 0
        folded = fold_mabn(model, "batch_norm")
        assert difference(folded(x), expected) < 1e-4
        fresh = copy.deepcopy(stock)
        fresh.load_state_dict(folded.state_dict(), strict=True)
        assert difference(fresh(x), expected) < 1e-4
        for how, inputs in (("yes", {}), ("with example_inputs", {"example_inputs": x})):
            try:
                folded = fold_mabn(model, "conv", **inputs)
                row["folds into conv"] = how
                break
            except ValueError as error:
                reason = str(error).splitlines()[1]
                row["folds into conv"] = (
                    f"refused: {textwrap.shorten(reason, 120, placeholder=' ...')}"
                )
        if "refused" not in row["folds into conv"]:
            error = difference(folded(x), expected)
            assert error < 1e-4, f"fold into conv differs by {error}"
    return row


def line(row: dict[str, str]) -> str:
    return "| " + " | ".join(value.replace("|", "/") for value in row.values()) + " |"


def table(rows: list[dict[str, str]]) -> Iterator[str]:
    converted = sum("refused" not in row["conversion"] for row in rows)
    yield "# Architectures of other libraries"
    yield ""
    yield f"`convert_mabn` converts {converted} of these {len(rows)} architectures, and refuses the others by name."
    yield "Written by `python tests/support/architectures.py`; `tests/surgery/test_architectures.py` checks each row."
    yield ""
    yield "- Converted: in evaluation the model equals the same network with BatchNorm of mean 0 behind"
    yield "  centred filters. After a training step, `fold_mabn` into `frozen_bn` changes no bit, and into"
    yield "  `batch_norm` or `conv` less than 1e-4. The stock model loads the state dict of the fold into"
    yield '  `batch_norm` strictly: `stock.load_state_dict(fold_mabn(model, "batch_norm").state_dict())`.'
    yield "- With example_inputs: only a forward shows which convolution stands in front of each norm:"
    yield "  `convert_mabn(model, example_inputs=images)`."
    yield "- Refused: MABN needs a centred convolution in front of each norm, and would lose what the norm"
    yield "  does beside. The table shows the first reason."
    yield "- `torch.optim.swa_utils.update_bn` and fvcore's `update_bn_stats` do nothing to a converted model:"
    yield "  call `update_mabn_stats(model, data_loader, num_iters)` instead. It takes"
    yield "  batches (input, target), too."
    yield "- torch.fx has to leave the layers whole, as in torchvision's `create_feature_extractor(model, [...],"
    yield '  tracer_kwargs={"leaf_modules": [MABN2d, CenConv2d]})`; a fold into `batch_norm` or `conv` needs nothing.'
    yield ""
    yield "| architecture | norms | conversion | folds into conv |"
    yield "|---|---|---|---|"
    for row in rows:
        yield line(row)


def main(architectures: list[str]) -> None:
    logging.getLogger("mabn_d2").setLevel(logging.ERROR)
    rows = []
    for number, architecture in enumerate(architectures or FAST + SLOW, start=1):
        try:
            rows.append(survey(architecture))
        except Exception as error:
            rows.append(
                {
                    "architecture": architecture,
                    "norms": "",
                    "conversion": f"ERROR {error!r}",
                    "folds into conv": "",
                }
            )
        print(number, line(rows[-1]), file=sys.stderr, flush=True)
    if not architectures:
        TABLE.write_text("\n".join(table(rows)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
