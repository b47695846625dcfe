"""Stacks of one norm, and a ResNet-50 at inference."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torchvision
from torch import nn

from .norms import layer_norms

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# The inputs of the norms in Mask R-CNN R50-FPN for 2 images of 800x1333, padded to 800x1344: stem,
# res2 to res5, FPN, box head (512 proposals an image), mask head (a quarter of them).
R50_FPN = [
    (2, 64, 400, 672), (2, 64, 200, 336), (2, 256, 200, 336), (2, 128, 100, 168), (2, 512, 100, 168),
    (2, 256, 50, 84), (2, 1024, 50, 84), (2, 512, 25, 42), (2, 2048, 25, 42), (2, 256, 100, 168),
    (2, 256, 25, 42), (1024, 256, 7, 7), (256, 256, 14, 14),
]  # fmt: skip

# What is timed in one case: its description, and name of a norm -> function without arguments.
Steps = dict[str, Callable[[], object]]
Case = tuple[dict, Steps]


def layer_cases(args: Namespace) -> Iterator[Case]:
    """Forward and backward of a stack of one norm, for each thread count, dtype, format, shape."""
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype, layout in [(d, f) for d in args.dtype for f in args.formats]:
            for shape, depth in [(s, d) for s in args.shapes for d in args.depth]:
                like = {"dtype": DTYPES[dtype], "device": args.device}
                x, dy = (
                    torch.randn(shape, **like).contiguous(memory_format=FORMATS[layout])
                    for _ in range(2)
                )
                steps: Steps = {}
                for name in args.norms:
                    if name == "copy":
                        steps[name] = partial(torch.empty_like(dy).copy_, dy)
                        continue
                    layers = [layer_norms()[name](shape[1]) for _ in range(depth)]
                    net = nn.Sequential(*layers).to(args.device)
                    steps[name] = partial(layer_step, net, x.requires_grad_(), dy)
                where = {"threads": threads, "dtype": dtype, "format": layout, "shape": shape}
                yield {**where, "depth": depth}, steps


def layer_step(net: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    """Run forward and backward."""
    torch.autograd.grad(net(x), [x, *net.parameters()], dy)


def inference_cases(args: Namespace) -> Iterator[Case]:
    """A torchvision ResNet-50 with each norm in place of BatchNorm, in evaluation mode."""
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype, layout in [(d, f) for d in args.dtype for f in args.formats]:
            like = {"dtype": DTYPES[dtype], "device": args.device}
            images = torch.randn(args.batch, 3, args.size, args.size, **like)
            images = images.contiguous(memory_format=FORMATS[layout])
            steps: Steps = {}
            for name in args.norms:
                net = torchvision.models.resnet50(norm_layer=layer_norms()[name]).eval()
                steps[name] = partial(infer, net.to(**like, memory_format=FORMATS[layout]), images)
            where = {"threads": threads, "dtype": dtype, "format": layout, "shape": images.shape}
            yield where, steps


@torch.inference_mode()
def infer(net: nn.Module, images: object) -> object:
    """Run a model without gradients."""
    return net(images)
