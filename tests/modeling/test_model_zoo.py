"""Detectron2's own R50-FPN models with NORM MABN wherever they have a NORM: build, step, save, load,
trace. Widths are cut; the architectures are not."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import nn

from detectors import randomized
from mabn_d2 import add_mabn_config
from mabn_d2.checkpoint import fold_detector
from mabn_d2.layers import MABN2d

FOLDER = Path(model_zoo.get_config_file("Base-RCNN-FPN.yaml")).parent
CONFIGS = sorted(
    str(path.relative_to(FOLDER))
    for path in FOLDER.glob("*/*R_50_FPN*.yaml")
    if path.parent.name not in ("quick_schedules", "LVISv0.5-InstanceSegmentation")
    and "dconv" not in path.name  # test_deformable
)
NODES = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD", "RETINANET")


def narrow(name):
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(str(FOLDER / name))
    model = cfg.MODEL
    model.DEVICE, model.WEIGHTS, model.BACKBONE.FREEZE_AT = "cpu", "", 0
    model.RESNETS.STEM_OUT_CHANNELS = model.RESNETS.WIDTH_PER_GROUP = 4
    model.RESNETS.RES2_OUT_CHANNELS = model.FPN.OUT_CHANNELS = 16
    model.ROI_BOX_HEAD.CONV_DIM = model.ROI_MASK_HEAD.CONV_DIM = 16
    model.ROI_BOX_HEAD.FC_DIM = model.SEM_SEG_HEAD.CONVS_DIM = 16
    model.ROI_KEYPOINT_HEAD.CONV_DIMS = (16,)
    model.RPN.PRE_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TRAIN = 20
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.SOLVER.IMS_PER_BATCH = 2
    for node in NODES:
        model[node].NORM = "MABN"
    return cfg


def inputs(cfg):
    records = []
    for k in range(2):
        size = (64, 96)
        target = Instances(size)
        target.gt_boxes = Boxes(torch.tensor([[8.0, 8, 60, 56], [30.0, 4, 90, 60]]))
        target.gt_classes = torch.tensor([k, 0])
        masks = torch.zeros(2, *size, dtype=torch.bool)
        masks[0, 8:56, 8:60] = masks[1, 4:60, 30:90] = True
        target.gt_masks = BitMasks(masks)
        points = torch.rand(2, 17, 3) * torch.tensor([50.0, 40, 0]) + torch.tensor([30.0, 8, 2])
        target.gt_keypoints = Keypoints(points)
        proposals = Instances(size)
        proposals.proposal_boxes = Boxes(torch.tensor([[6.0, 8, 60, 50], [0.0, 0, 20, 20]]))
        proposals.objectness_logits = torch.zeros(2)
        records.append(
            {
                "image": torch.randint(0, 256, (3, *size), dtype=torch.uint8),
                "instances": target,
                "proposals": proposals,
                "height": size[0],
                "width": size[1],
                "sem_seg": torch.randint(0, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, size),
            }
        )
    return records


def slow(name):
    """Longer schedules of models that are tested already, and the 1,203 classes of LVIS."""
    return any(part in name for part in ("_3x", "_9x", "LVIS"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if slow(n) else []) for n in CONFIGS]
)
def test_step_save_load_trace(name, tmp_path):
    cfg = narrow(name)
    model = build_model(cfg)
    norms = [m for m in model.modules() if isinstance(m, MABN2d)]
    assert len(norms) >= 53 + 8 and not any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()
    )
    batch = inputs(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with EventStorage():
        losses = model.train()(batch)
    sum(losses.values()).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())

    DetectionCheckpointer(model, str(tmp_path)).save("model")
    other = build_model(cfg)
    found = DetectionCheckpointer(other).load(str(tmp_path / "model.pth"))
    assert "__unmatched__" not in found and not found.get("missing_keys")
    model.eval(), other.eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for key, value in model.backbone(image).items():
            assert torch.equal(value, other.backbone(image)[key])
        model(batch)
        adapter = TracingAdapter(model.backbone, image)
        traced = torch.jit.trace(adapter, adapter.flattened_inputs)
        for ours, theirs in zip(adapter(image), traced(image), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", [
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
])  # fmt: skip
def test_test_time_augmentation(name):
    """Finds what the model itself finds where the one augmentation is none."""
    cfg = narrow(name)
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = (64,), False
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = cfg.TEST.DETECTIONS_PER_IMAGE = 10
    model = randomized(build_model(cfg))
    augmented = GeneralizedRCNNWithTTA(cfg, model)
    records = [{k: r[k] for k in ("image", "height", "width")} for r in inputs(cfg)]
    with torch.no_grad():
        plain, found = model(records), augmented(records)
    for a, b in zip(plain, found, strict=True):
        a, b = a["instances"], b["instances"]
        assert len(a) > 0 and len(b) > 0
        torch.testing.assert_close(a.scores[:1], b.scores[:1], rtol=1e-4, atol=1e-6)
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = (64, 96), True
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        outputs = GeneralizedRCNNWithTTA(cfg, model)(records)
    assert all(o["instances"].pred_boxes.tensor.isfinite().all() for o in outputs)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_deformable():
    name = "Misc/mask_rcnn_R_50_FPN_3x_dconv_c3-c5.yaml"
    if find_spec("detectron2._C") is None:
        with pytest.raises(ImportError, match="not compiled"):
            build_model(narrow(name))
        return
    model = build_model(narrow(name))
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("CenDeformConv") == 13 and "DeformConv" not in kinds
    fold_detector(model, narrow(name))  # loads the result into the stock model, strictly
