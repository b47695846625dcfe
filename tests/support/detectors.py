"""A narrow Mask R-CNN R50-FPN with MABN whose random weights find instances on digit scenes."""

import numpy as np
import torch
from detectron2.config import get_cfg
from torch import nn

from mabn_d2 import add_mabn_config
from mabn_d2.data.digit_scenes import SceneParams, load_sources, render_scene
from mabn_d2.layers import MABN2d
from paths import ROOT


def narrow_cfg(**resnets):
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/scratch_mask_rcnn_R50_FPN_mabn_2x.yaml"))
    model = cfg.MODEL
    model.DEVICE = "cpu"
    model.RESNETS.STEM_OUT_CHANNELS, model.RESNETS.RES2_OUT_CHANNELS = 8, 16
    model.RESNETS.WIDTH_PER_GROUP = 4
    for key, value in resnets.items():
        model.RESNETS[key] = value
    model.FPN.OUT_CHANNELS = model.ROI_BOX_HEAD.CONV_DIM = model.ROI_MASK_HEAD.CONV_DIM = 16
    model.ROI_BOX_HEAD.FC_DIM = 32
    model.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"  # whose random weights let signals through
    model.ROI_HEADS.NUM_CLASSES = 10
    model.RPN.PRE_NMS_TOPK_TEST, model.RPN.POST_NMS_TOPK_TEST = 200, 50
    model.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.INPUT.MIN_SIZE_TEST = 128
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    return cfg


def randomized(model):
    """Give every layer of a model random values as training might, and set it to evaluation."""
    for module in model.modules():
        if isinstance(module, MABN2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.2)
            module.running_var.uniform_(0.5, 2)
            module.buffer_x2.uniform_(0.5, 2)
            module.iters.fill_(900)
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def fused(model):
    """Return how many MABN layers of a model have the ReLU fused."""
    return sum(isinstance(m, MABN2d) and m.activation == "relu" for m in model.modules())


def scenes(count=2):
    """Return digit scenes as Detectron2's models take them: BGR, 144 pixels square."""
    sources, params = load_sources("val"), SceneParams()
    images = [
        render_scene(np.random.default_rng([7, i]), sources, params).image for i in range(count)
    ]
    tensors = [torch.as_tensor(image[..., ::-1].copy()).permute(2, 0, 1) for image in images]
    return [{"image": t, "height": t.shape[1], "width": t.shape[2]} for t in tensors]


def assert_same_instances(expected, found, rtol=1e-5):
    """Scores, classes, boxes and masks of two lists of outputs, of which there must be some."""
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        a, b = a["instances"], b["instances"]
        assert len(a) == len(b) > 5
        assert torch.equal(a.pred_classes, b.pred_classes)
        torch.testing.assert_close(a.scores, b.scores, rtol=rtol, atol=0)
        boxes = a.pred_boxes.tensor
        torch.testing.assert_close(b.pred_boxes.tensor, boxes, rtol=rtol, atol=rtol * 144)
        assert (a.pred_masks != b.pred_masks).float().mean() <= 10 * rtol
        assert 0.01 < a.pred_masks.float().mean() < 0.99
