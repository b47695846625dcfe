"""What is timed of Detectron2's Mask R-CNN R50-FPN: inference and a training step."""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from ..surgery.fold import fold_mabn
from .layer_cases import DTYPES, Case, Steps, infer
from .norms import detectron2_norms

OBJECTS = 128  # in an image of a training step: the most that Detectron2's heads take
REGIONS = 512  # of an image, that the heads train on


def detector_cases(args: Namespace) -> Iterator[Case]:
    """Mask R-CNN in evaluation mode. Its detections are equal under each norm."""
    source = build_detector("MABN", args.device)
    folded = fold_mabn(source)
    stock = build_detector("FrozenBN", args.device)
    stock.load_state_dict(folded.state_dict())
    made = {
        "frozen_bn": lambda: stock,
        "mabn": lambda: source,
        "mabn_folded": lambda: folded,
        "mabn_folded_conv": lambda: fold_mabn(source, "conv"),
    }
    models = {name: made[name]() for name in args.norms}
    images = [{"image": random_image(args.size)["image"]} for _ in range(args.batch)]
    for threads in args.threads:
        torch.set_num_threads(threads)
        steps: Steps = {name: partial(infer, model, images) for name, model in models.items()}
        shape = (args.batch, 3, args.size, args.size)
        yield {"threads": threads, "dtype": "fp32", "format": "nchw", "shape": shape}, steps


def step_cases(args: Namespace) -> Iterator[Case]:
    """A training step of Mask R-CNN with each norm in backbone, FPN and heads."""
    for threads in args.threads:
        torch.set_num_threads(threads)
        images = [random_image(args.size) for _ in range(args.batch)]
        for dtype in args.dtype:
            steps: Steps = {}
            for name in args.norms:
                model = build_detector(detectron2_norms()[name], args.device, training=True)
                optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
                steps[name] = partial(train_step, model, optimizer, images, args.device, dtype)
            shape = (args.batch, 3, args.size, args.size)
            yield {"threads": threads, "dtype": dtype, "format": "nchw", "shape": shape}, steps


def build_detector(norm: str, device: str, training: bool = False) -> nn.Module:
    """Build Mask R-CNN R50-FPN with a norm in backbone, FPN and heads, without weights.

    Args:
        norm: name in Detectron2's configs.
        device: where it is built.
        training: True makes each step train on equally many regions.
    """
    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT = device, "", 0
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 4, 1
    for node in cfg.MODEL.RESNETS, cfg.MODEL.FPN, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD:
        node.NORM = norm
    if training:
        # All 1000 proposals and OBJECTS true boxes compete, whatever an untrained model proposes: of
        # each image REGIONS are chosen, of which OBJECTS have a mask.
        cfg.MODEL.RPN.NMS_THRESH, cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS = 1.0, [0.7]
    return build_model(cfg).train(training)


def random_image(size: int, objects: int = OBJECTS) -> dict:
    """Return a noise image with rectangles to detect, as Detectron2 gives it to a model."""
    corners = torch.rand(objects, 2) * size * 0.6
    boxes = torch.cat([corners, corners + size * (0.1 + 0.3 * torch.rand(objects, 2))], 1)
    masks = torch.zeros(objects, size, size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    classes = torch.randint(80, (objects,))
    fields = {"gt_boxes": Boxes(boxes), "gt_classes": classes, "gt_masks": BitMasks(masks)}
    instances = Instances((size, size), **fields)
    return {"image": torch.randint(256, (3, size, size), dtype=torch.uint8), "instances": instances}


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: list[dict], device: str, dtype: str
) -> None:
    """Run one training step; raise RuntimeError if it trains on fewer regions than others."""
    with EventStorage() as storage, torch.autocast(device, DTYPES[dtype], enabled=dtype != "fp32"):
        loss = sum(model(images).values())
        counts = [storage.latest()[f"roi_head/num_{kind}_samples"][0] for kind in ("fg", "bg")]
    if counts != [OBJECTS, REGIONS - OBJECTS]:
        raise RuntimeError(
            f"{counts} regions with and without an object: this step can't be compared with others"
        )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
