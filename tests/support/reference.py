"""The layer by its formulas in float64, lists for windows: what MABN2d must equal."""

import torch

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


def per_channel(x):
    """(N, C, H, W) -> C lists of N * H * W numbers as (C, N * H * W)."""
    return x.detach().double().cpu().transpose(0, 1).flatten(1)


def as_maps(rows, like):
    n, c, h, w = like.shape
    return rows.view(c, n, h, w).transpose(0, 1)


class Reference:
    """Equations of the paper, one iteration after the other; vectors are (C,), on the CPU."""

    def __init__(self, layer):
        self.weight, self.bias = layer.weight.detach().double(), layer.bias.detach().double()
        self.eps, self.momentum = layer.eps, layer.momentum
        self.warmup, self.clip_start = layer.warmup_iters, layer.clip_start
        self.limit, self.relu = layer.clip_limit, layer.activation == "relu"
        self.t = 0
        self.running_var = torch.ones_like(self.weight)
        self.ring_x = [torch.zeros_like(self.weight)] * layer.window
        self.ring_g = [torch.zeros_like(self.weight)] * layer.window

    def forward(self, x):
        """Return y and what the backward of this very forward needs."""
        self.t += 1
        t, m = self.t, len(self.ring_x)
        rows = per_channel(x)
        v = self.ring_x[t % m] = (rows * rows).mean(1)
        if t > m and t >= self.warmup:
            v = sum(self.ring_x) / m
        r = torch.ones_like(v)
        if t > max(self.clip_start, self.warmup):
            r = (v + self.eps).sqrt() / (self.running_var + self.eps).sqrt()
            r = r.clamp(1 / self.limit, self.limit)
        z = rows / (v + self.eps).sqrt()[:, None]
        y = (self.weight * r)[:, None] * z + self.bias[:, None]
        positive = y > 0 if self.relu else torch.ones_like(y, dtype=torch.bool)
        self.running_var = self.momentum * self.running_var + (1 - self.momentum) * v
        return as_maps(y * positive, x), (t, v, r, z, positive)

    def backward(self, kept, dy):
        """Return dx, dweight, dbias."""
        t, v, r, z, positive = kept
        m = len(self.ring_g)
        rows = per_channel(dy) * positive
        g = rows * (self.weight * r)[:, None]
        psi = self.ring_g[t % m] = (g * z).mean(1)
        if t > m and t >= self.warmup:
            psi = sum(self.ring_g) / m
        dx = (g - z * psi[:, None]) / (v + self.eps).sqrt()[:, None]
        return as_maps(dx, dy), (rows * r[:, None] * z).sum(1), rows.sum(1)


def train(layer, iterations=1):
    """Run some iterations, forward and backward, on random images."""
    for _ in range(iterations):
        x = torch.randn(2, layer.num_features, 4, 5, requires_grad=True)
        layer(x).pow(3).sum().backward()
    return layer


def assert_equal_state(layer, expected):
    for name, value in layer.state_dict().items():
        assert torch.equal(value, expected[name].reshape(value.shape)), name
