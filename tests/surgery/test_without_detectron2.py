"""Conversion, folding, ReLU and recalibration in a process that can't import Detectron2."""

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["detectron2"] = None
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d
import mabn_d2
from mabn_d2 import CenConv2d, MABN2d
from mabn_d2 import convert_mabn, fold_mabn, fuse_relu, unfuse_relu, update_mabn_stats

torch.manual_seed(0)
model = convert_mabn(resnet18(), batch_size=2)
model = nn.Sequential(model, nn.Sequential(nn.Unflatten(1, (10, 10, 10))))
head = nn.Sequential(nn.Conv2d(10, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
model.append(fuse_relu(convert_mabn(head)))
assert head[1].activation == "relu"
x = torch.randn(2, 3, 64, 64)
model(x).square().mean().backward()
update_mabn_stats(model, [x, x + 1], 2)
model.eval()
assert sum(type(m) is MABN2d for m in model.modules()) == 21
assert sum(type(m) is CenConv2d for m in model.modules()) == 21
for into in ("frozen_bn", "conv"):
    folded = fold_mabn(model, into)
    kinds = {type(m) for m in folded.modules()}
    assert not kinds & {MABN2d, CenConv2d}
    assert any(issubclass(k, FrozenBatchNorm2d) for k in kinds) == (into == "frozen_bn")
    exact = {"rtol": 0, "atol": 0} if into == "frozen_bn" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(folded(x), model(x), **exact)
for dtype in (torch.half, torch.bfloat16):
    half = nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4), CenConv2d(4, 4, 3), MABN2d(4)).to(dtype)
    folded = fold_mabn(half.eval())
    assert torch.equal(folded(x.to(dtype)), half(x.to(dtype)))
    assert torch.equal(torch.jit.script(folded)(x.to(dtype)), half(x.to(dtype)))
fused = fold_mabn(nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4, activation="relu")).eval())
torch.testing.assert_close(torch.jit.script(fused)(x), fused(x))
assert unfuse_relu(head)[1].activation is None
assert sorted(mabn_d2.__all__) == [
    "BatchRenorm2d", "CenConv2d", "MABN2d", "convert_mabn", "fold_mabn", "fuse_relu",
    "get_config_file", "rescale_mabn_windows",
    "unfuse_relu", "update_mabn_stats",
]
print([name for name in sys.modules if name.split(".")[0] == "detectron2"])
"""


def test_surgery_without_detectron2():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['detectron2']\n"


def test_both_classes_are_public_names_with_detectron2():
    code = "from mabn_d2 import MABN2d, CenConv2d; import sys; assert 'detectron2' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
