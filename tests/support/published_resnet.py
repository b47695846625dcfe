"""A ResNet classifier as the authors of MABN, and torchvision, wrote theirs: plain torch, with the
names of the published checkpoint; MABN for evaluation only."""

import torch
import torch.nn.functional as F
from torch import nn

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class CenConv(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.flatten(1).mean(1)[:, None, None, None]
        return F.conv2d(x, weight, None, self.stride, self.padding, groups=self.groups)


class Mabn(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))

    def forward(self, x):
        y = x / (self.running_var + self.eps).sqrt()[:, None, None]
        return self.weight[:, None, None] * y + self.bias[:, None, None]


class Block(nn.Module):
    def __init__(self, layers, channels, out_channels, stride, conv, norm):
        super().__init__()
        self.count = len(layers)
        for i, (kernel, width, layer_stride, groups) in enumerate(layers, start=1):
            self.add_module(
                f"conv{i}",
                conv(
                    channels if i == 1 else last,
                    width,
                    kernel,
                    layer_stride,
                    kernel // 2,
                    groups=groups,
                    bias=False,
                ),
            )
            self.add_module(f"bn{i}", norm(width))
            last = width
        self.downsample = None
        if stride != 1 or channels != out_channels:
            shortcut = conv(channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, norm(out_channels))

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.count else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class PublishedResNet(nn.Module):
    """Args: depth of BLOCKS; width of the stem, 64 as published; groups and width_per_group (of
    64), those of a ResNeXt; stride_in_1x1, where bottlenecks stride; conv and norm, constructors."""

    def __init__(
        self,
        depth=50,
        width=64,
        stride_in_1x1=False,
        groups=1,
        width_per_group=64,
        classes=1000,
        conv=CenConv,
        norm=Mabn,
    ):
        super().__init__()
        self.conv1 = conv(3, width, 7, 2, 3, bias=False)
        self.bn1 = norm(width)
        channels = width
        for stage, count in enumerate(BLOCKS[depth]):
            inner = width * 2**stage
            out = inner if depth < 50 else inner * 4
            grouped = inner * width_per_group // 64 * groups
            blocks = []
            for i in range(count):
                s = 2 if i == 0 and stage > 0 else 1
                basic = [(3, inner, s, 1), (3, out, 1, 1)]
                s1, s3 = (s, 1) if stride_in_1x1 else (1, s)
                bottleneck = [(1, grouped, s1, 1), (3, grouped, s3, groups), (1, out, 1, 1)]
                layers = basic if depth < 50 else bottleneck
                blocks.append(Block(layers, channels, out, s, conv, norm))
                channels = out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if hasattr(module, "running_var"):
                # A filter's fan-in is about the second moment of what its norm gets.
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.uniform_(module.weight, 0.2, 0.6)
                nn.init.normal_(module.bias, std=0.2)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def features(self, x):
        """(N, 3, H, W) -> {"res2": ..., ..., "res5": (N, C, H / 32, W / 32)}."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        result = {}
        for stage in range(1, 5):
            x = result[f"res{stage + 1}"] = getattr(self, f"layer{stage}")(x)
        return result

    def forward(self, x):
        return self.fc(self.features(x)["res5"].mean((2, 3)))


def add_windows(state, form, batches=16):
    """Return a state dict with windows as "classification" or "detection" checkpoints have them."""
    state = dict(state)
    for name in [name for name in state if name.endswith("running_var")]:
        norm, channels = name.removesuffix("running_var"), state[name].numel()
        windows = {
            "classification": {
                "sta_matrix": (16, 32),
                "pre_x2": (16, channels),
                "pre_gz": (16, channels),
            },
            "detection": {"buffer_x2": (batches, channels), "buffer_gz": (batches, channels)},
        }[form]
        state |= {norm + entry: torch.rand(shape) for entry, shape in windows.items()}
        state[norm + "iters"] = torch.tensor([600000])
    return state
