"""The layers need torch only: they train in a process that can't import Detectron2."""

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["detectron2"] = None
import mabn_d2, torch
from mabn_d2.layers import BatchRenorm2d, CenConv2d, MABN2d
try:
    import detectron2
except ImportError:
    print("without")
torch.manual_seed(0)
x = torch.randn(2, 2, 16, 16)
wanted = x[:, :1] * x[:, 1:]
for norm in (MABN2d(8), BatchRenorm2d(8, warmup_iters=20, r_max_iter=40, d_max_iter=40)):
    net = torch.nn.Sequential(
        CenConv2d(2, 8, 3, padding=1), norm, torch.nn.ReLU(), CenConv2d(8, 1, 3, padding=1)
    )
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    losses = []
    for _ in range(150):
        loss = (net(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(losses[-1] < 0.5 * losses[0])
print([name for name in sys.modules if name.split(".")[0] == "detectron2"])
"""


def test_layers_train_without_detectron2():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["without", "True", "True", "['detectron2']", ""]
