"""A folded model is exported as stock Detectron2's are: torch.export, tracing, ONNX."""

import numpy as np
import pytest
import torch
from torch import nn

from detectors import narrow_cfg, randomized
from mabn_d2 import fold_mabn
from mabn_d2.modeling.norm import build_model


class Pyramid(nn.Module):
    """Backbone and FPN: (N, 3, H, W) -> p2 to p6."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return tuple(self.backbone(x).values())


@pytest.fixture(scope="module")
def pyramids():
    torch.manual_seed(0)
    backbone = randomized(build_model(narrow_cfg())).backbone
    return Pyramid(backbone), {
        into: Pyramid(fold_mabn(backbone, into)) for into in ("frozen_bn", "conv")
    }


@pytest.fixture(scope="module")
def x():
    return torch.randn(1, 3, 128, 160)


def assert_close(found, expected):
    assert len(found) == len(expected) == 5
    for a, b in zip(found, expected, strict=True):
        scale = b.abs().max().item()
        torch.testing.assert_close(torch.as_tensor(a), b, rtol=0, atol=1e-4 * scale)


@torch.no_grad()
@pytest.mark.parametrize("into", ["frozen_bn", "conv"])
def test_torch_export(pyramids, into, x):
    model, folded = pyramids
    program = torch.export.export(folded[into], (x,))
    assert_close(program.module()(x), model(x))


@torch.no_grad()
def test_trace(pyramids, x):
    model, folded = pyramids
    traced = torch.jit.trace(folded["frozen_bn"], x)
    larger = torch.randn(1, 3, 192, 128)
    assert_close(traced(larger), model(larger))


@torch.no_grad()
def test_onnx(pyramids, x, tmp_path):
    import onnxruntime  # of the extra `export`, which `make env` installs

    model, folded = pyramids
    path = str(tmp_path / "pyramid.onnx")
    # torch 2.4 has another exporter of this kind, which needs versions of onnxscript that newer torch refuses.
    dynamo = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 5)
    torch.onnx.export(folded["conv"], (x,), path, dynamo=dynamo)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(found, model(x))
    blank = session.run(None, {session.get_inputs()[0].name: np.zeros_like(x.numpy())})
    assert np.abs(blank[0] - found[0]).max() > 1e-2  # the export is no constant
