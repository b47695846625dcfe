"""The state of version 1, written before the split form had a class of its own, goes on loading."""

from pathlib import Path

import pytest
import torch

from mabn_d2.layers import MABN2d, SplitMABN2d
from reference import assert_close

VERSION1 = Path(__file__).parents[1] / "golden" / "version1"
pytestmark = pytest.mark.usefixtures("operators")


@pytest.mark.parametrize("name, kind", [("mabn", MABN2d), ("mabn_split", SplitMABN2d)])
def test_a_step_and_evaluation_agree(name, kind):
    file = torch.load(VERSION1 / f"{name}.pth", weights_only=True)
    layer = MABN2d(5, **file["settings"])
    assert type(layer) is kind
    layer.load_state_dict(file["state"])
    assert all(torch.equal(value, file["state"][key]) for key, value in layer.state_dict().items())
    step = file["step"]
    x = step["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(step["dy"])
    for found, key in (
        (layer.weight.grad, "dweight"),
        (layer.bias.grad, "dbias"),
        (layer.running_var, "running_var"),
    ):
        assert_close(found, file[key], torch.float32)
    assert_close(y, step["y"], torch.float32)
    assert_close(x.grad, step["dx"], torch.float32)
    assert_close(layer.eval()(file["x_eval"]), file["y_eval"], torch.float32)


def test_state_carries_its_version():
    for layer in MABN2d(5), SplitMABN2d(5):
        state = layer.state_dict()
        assert state._metadata[""]["version"] == 2
        state._metadata[""]["version"] = 3
        with pytest.raises(RuntimeError, match="newer mabn_d2 .version 3 .*: upgrade mabn_d2"):
            layer.load_state_dict(state)
