"""The layer by its formulas in float64: what MABN2d must equal."""

import torch

from mabn_d2.layers.naive import NaiveMABN2d

# Relative to the tensor's largest value; float16 and bfloat16 keep 11 and 8 bits.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
FORMATS = [torch.contiguous_format, torch.channels_last]
# Ways to lay the values of a contiguous (N, C, H, W) out; the last changes the values.
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch_inside": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "sliced": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 0))[:, :, 1:, 1:-2],
    "expanded": lambda x: x[:, :, :1, :1].expand_as(x),
}


def assert_close(actual, expected, dtype=torch.float64, factor=1, scale=None):
    """Within `factor` tolerances of dtype, relative to `scale`, the largest expected value if None.

    A scale is needed where terms cancel: one pixel of plain statistics has a dx of (almost) zero.
    """
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    scale = expected.abs().max().item() if scale is None else scale
    limit = factor * TOLERANCE[dtype] * max(scale, 1e-12)
    assert (actual - expected).abs().max().item() <= limit


class Reference:
    """`NaiveMABN2d` in float64 on the CPU, with the parameters and settings of a MABN2d."""

    def __init__(self, layer):
        self.naive = NaiveMABN2d(
            layer.num_features,
            layer.window,
            layer.eps,
            layer.momentum,
            layer.warmup_iters,
            layer.clip_start,
            layer.clip_limit,
            layer.activation == "relu",
            torch.float64,
        )
        with torch.no_grad():
            self.naive.weight.copy_(layer.weight)
            self.naive.bias.copy_(layer.bias)

    running_var = property(lambda self: self.naive.running_var)
    window_x2 = property(lambda self: self.naive.window_x2)
    window_gz = property(lambda self: self.naive.window_gz)

    @torch.no_grad()
    def forward(self, x):
        """Return y and what the backward of this very forward needs."""
        return self.naive.normalize(x.double().cpu())

    @torch.no_grad()
    def backward(self, kept, dy):
        """Return dx, dweight, dbias."""
        return self.naive.gradients(kept, dy.double().cpu())


def train(layer, iterations=1):
    """Run some iterations, forward and backward, on random images."""
    for _ in range(iterations):
        x = torch.randn(2, layer.num_features, 4, 5, requires_grad=True)
        layer(x).pow(3).sum().backward()
    return layer


def assert_equal_state(layer, expected):
    for name, value in layer.state_dict().items():
        assert torch.equal(value, expected[name].reshape(value.shape)), name
