"""What the import does to Detectron2, in processes of their own."""

import subprocess
import sys

import pytest

HEAD = """
import sys, types
import torch
from torch import nn
"""
ODD_MODULES = """
class Slots:
    __slots__ = ()
class Proxy:
    def __getattr__(self, name):
        raise RuntimeError(name)
sys.modules["odd.slots"] = Slots()
sys.modules["odd.none"] = None
sys.modules["odd.nameless"] = types.SimpleNamespace(get_norm=None)
nameless = types.ModuleType("odd.module")
del nameless.__dict__["__name__"]
sys.modules["odd.module"] = nameless
from detectron2.layers import get_norm as stock
nameless.own_name = stock
import mabn_d2
from mabn_d2 import MABN2d
assert type(nameless.own_name("MABN", 4)) is MABN2d
print("done")
"""
RELOAD = """
import importlib
import mabn_d2
importlib.reload(mabn_d2)
importlib.reload(mabn_d2.modeling)
import detectron2.layers
from detectron2.modeling import build_model
assert detectron2.layers.get_norm("MABN", 4).num_features == 4
for name in [name for name in sys.modules if name.split(".")[0] == "mabn_d2"]:
    del sys.modules[name]
import mabn_d2
norm = detectron2.layers.get_norm("MABN", 4)
assert type(norm) is mabn_d2.MABN2d
assert detectron2.layers.get_norm._stock.__module__ == "detectron2.layers.batch_norm"
assert "mabn_d2" not in detectron2.layers.get_norm._stock.__code__.co_filename
conv = detectron2.layers.Conv2d(3, 4, 3, norm=norm)
conv(torch.randn(1, 3, 8, 8))
assert type(conv).__mro__[1] is mabn_d2.CenConv2d
print("done")
"""
LAZY = """
import mabn_d2
from detectron2.config import LazyCall as L, LazyConfig
from detectron2.layers import get_norm
from detectron2.solver import get_default_optimizer_params
from omegaconf import OmegaConf
cfg = OmegaConf.create({"norm": L(get_norm)(norm="MABN", out_channels=4)}, flags={"allow_objects": True})
cfg.params = L(get_default_optimizer_params)()
LazyConfig.save(cfg, "config.yaml")
text = open("config.yaml").read()
assert "mabn_d2" not in text, text
assert "detectron2.layers.get_norm" in text and "detectron2.solver.get_default_optimizer_params" in text
import pickle
assert pickle.loads(pickle.dumps(get_norm)) is get_norm
print("done")
"""
WARNING = """
import logging
import mabn_d2
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
logging.getLogger("detectron2").addHandler(Keep())
shapes = [ShapeSpec(channels=8)] * 3
for norm in ("MABN", "BRN"):
    RetinaNetHead(input_shape=shapes, num_classes=4, num_anchors=1, conv_dims=[8], norm=norm)
    assert not records, records
print("done")
"""


@pytest.mark.parametrize("program", [ODD_MODULES, RELOAD, LAZY, WARNING])
def test_process(program, tmp_path):
    command = [sys.executable, "-c", HEAD + program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["done"], done.stderr
