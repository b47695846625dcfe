"""surgery/fuse_relu.py: a fused detector is the unfused one, with fewer passes."""

import copy
import pickle

import pytest
import torch
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.utils.events import EventStorage
from torch import nn

from detectors import assert_same_instances, fused, narrow_cfg, randomized, scenes
from inputs import training_inputs
from mabn_d2 import fuse_relu, unfuse_relu
from mabn_d2.modeling.norm import build_model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomized(build_model(narrow_cfg()))


def test_round_trip(model):
    """Stem, two norms in each of 16 blocks, four in each head; and back."""
    plain = unfuse_relu(copy.deepcopy(model))
    assert fused(model) == 1 + 2 * 16 + 4 + 4 and fused(plain) == 0
    assert type(plain.backbone.bottom_up.res2[0]) is BottleneckBlock
    assert type(plain.roi_heads.box_head.conv1.activation) is nn.ReLU
    again = fuse_relu(copy.deepcopy(plain))
    assert str(fuse_relu(again)) == str(model) != str(plain)
    assert list(plain.state_dict()) == list(model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_equal_in_evaluation(model, duplicate):
    plain, other = unfuse_relu(duplicate(model)), duplicate(model)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 96)
    features = [list(m.backbone(x).values()) for m in (model, plain, other)]
    for expected, *found in zip(*features, strict=True):
        assert all(torch.equal(y, expected) for y in found)
    assert_same_instances(plain(scenes()), model(scenes()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_in_training(model, dtype):
    gradients, states, losses = [], [], []
    for net in (copy.deepcopy(model), unfuse_relu(copy.deepcopy(model))):
        torch.manual_seed(0)  # anchors and RoIs are sampled
        with EventStorage(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses.append(sum(net.train()(training_inputs()).values()))
        losses[-1].backward()
        gradients.append([p.grad for p in net.parameters()])
        states.append(net.state_dict())
    torch.testing.assert_close(*losses)
    limit = 1e-3 if dtype == torch.float32 else 0.1
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= limit * b.norm()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=limit, atol=limit)
