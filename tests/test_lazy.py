"""LazyConfig: the same model as the YAML's, and a run of the launcher on digit scenes."""

import json
import runpy

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model

from mabn_d2.layers import MABN2d
from mabn_d2.solver import build_optimizer

from conftest import ROOT
from inputs import training_inputs
from test_all_configs import load

NAMES = ["mask_rcnn_R50_FPN_mabn_2x", "scratch_mask_rcnn_R50_FPN_mabn_2x"]


@pytest.mark.parametrize("name", NAMES)
def test_twins_have_equal_keys_and_outputs(name):
    cfg, lazy = load(f"{name}.yaml"), LazyConfig.load(str(ROOT / "configs/lazy" / f"{name}.py"))
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    lazy.model.proposal_generator.post_nms_topk = (1000, 20)
    one, two = build_model(cfg), instantiate(lazy.model)
    norms = [m for m in one.modules() if isinstance(m, MABN2d)]
    assert len(norms) == sum(isinstance(m, MABN2d) for m in two.modules()) == 69
    for norm in norms:
        norm.running_var.uniform_(0.5, 2)
    one.roi_heads.box_predictor.cls_score.weight.data.mul_(100)  # scores that differ
    assert one.state_dict().keys() == two.state_dict().keys()
    two.load_state_dict(one.state_dict())
    inputs = training_inputs()
    with torch.no_grad():
        found = [model.eval()(inputs)[0]["instances"] for model in (one, two)]
    assert len(found[0]) > 5
    for a, b in zip(*(f.get_fields().values() for f in found), strict=True):
        assert torch.equal(*(getattr(t, "tensor", t) for t in (a, b)))

    lazy.optimizer.params.model = two
    groups = [
        [{k: v for k, v in g.items() if k in ("lr", "weight_decay", "momentum")}
         | {"count": len(g["params"])} for g in optimizer.param_groups]
        for optimizer in (build_optimizer(cfg, one), instantiate(lazy.optimizer))
    ]
    assert groups[0] == groups[1]
    scheduler = instantiate(lazy.lr_multiplier)
    assert [round(scheduler(i / 180000), 6) for i in (0, 500, 119999, 120000, 160000)] == [
        0.333333, 1, 1, 0.1, 0.01]
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER


USERS = """
from detectron2.config import LazyConfig

globals().update(LazyConfig.load({twin!r}))
model.backbone.bottom_up.stages.depth = 18
del model.backbone.bottom_up.stages.stride_in_1x1
model.backbone.out_channels = 16
model.proposal_generator.head.in_channels = 16
model.proposal_generator.post_nms_topk = (20, 10)
model.roi_heads.update(num_classes=10, batch_size_per_image=8)
for _head in (model.roi_heads.box_head, model.roi_heads.mask_head):
    _head.conv_dims = [16, 16]
    _head.input_shape.channels = 16
dataloader.train.update(total_batch_size=2, num_workers=0)
dataloader.train.dataset.names = "small_scenes_train"
dataloader.train.mapper.instance_mask_format = "bitmask"
dataloader.train.mapper.augmentations[0].short_edge_length = (64,)
dataloader.test.num_workers = 0
dataloader.test.dataset.names = "small_scenes_val"
dataloader.test.mapper.augmentations[0].short_edge_length = 64
optimizer.lr = 0.001
train.update(output_dir={output!r}, log_period=1)
train.mabn.clip_start = 100
"""


def test_launcher_trains_resumes_and_evaluates(small_scenes, tmp_path):
    tool = runpy.run_path(str(ROOT / "tools/lazyconfig_train_net.py"))
    twin, config = str(ROOT / f"configs/lazy/{NAMES[1]}.py"), tmp_path / "users.py"
    config.write_text(USERS.format(twin=twin, output=str(tmp_path)))

    def run(*arguments):
        command = ["--config-file", str(config), "--num-gpus", "0", *arguments]
        return tool["main"](default_argument_parser().parse_args(command))

    run("train.max_iter=2")
    run("--resume", "train.max_iter=3")
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line][:3] == [0, 1, 2]
    state = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert state["iteration"] == 2
    assert state["model"]["backbone.bottom_up.stem.conv1.norm.iters"].item() == 3
    results = run("--resume", "--eval-only")
    assert results["segm"]["AP"] == pytest.approx(lines[-1]["segm/AP"])
