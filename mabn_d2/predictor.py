"""From a checkpoint to predictions on images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import (
    _apply_exif_orientation,
    convert_PIL_to_numpy,
    read_image,
)
from detectron2.modeling import ProposalNetwork, SemanticSegmentor
from detectron2.structures import Instances
from PIL import Image
from torch import nn

from .checkpoint import CheckpointError, read_checkpoint
from .checkpoint.description import classes_of, config_of
from .checkpoint.stock_detector import load_whole
from .data.mapper import BadImageError, NamingMapper, check_header
from .modeling.norm import BUILD_ERRORS, build_model
from .surgery.fold import fold_mabn


class Predictor:
    """Finds objects in images.

        predictor = mabn_d2.load_predictor("output/own_data/model_best.pth")
        instances = predictor("photo.jpg")
        for name, score, box in zip(
            instances.class_names, instances.scores, instances.pred_boxes
        ):
            print(name, float(score), box.tolist())

    Args:
        model: in evaluation mode.
        cfg: the config that it was built from; INPUT says how images are read and resized.
        classes: COCO categories in the model's order.
        threshold: objects with a lower score are left out.
    """

    def __init__(
        self, model: nn.Module, cfg: CfgNode, classes: list[dict[str, Any]], threshold: float = 0.5
    ) -> None:
        self.model, self.cfg, self.classes, self.threshold = model, cfg, classes, threshold
        self.class_names = [c["name"] for c in classes]
        size = cfg.INPUT.MIN_SIZE_TEST
        self._resize = T.ResizeShortestEdge([size, size], cfg.INPUT.MAX_SIZE_TEST)
        self._reader = NamingMapper(lambda record: read_image(record["file_name"], "BGR"))

    def read(self, path: str | Path) -> np.ndarray:
        """Return an image as it is read for training, turned upright: (H, W, 3) uint8, BGR.

        Raises:
            BadImageError: if it can't be read; one line with its path.
        """
        return self._reader({"file_name": str(path)})

    def to_tensor(self, image: np.ndarray) -> torch.Tensor:
        """Return what the model takes of an image: resized, in the format INPUT.FORMAT.

        Args:
            image: (H, W, 3) uint8, BGR.
        Returns:
            (C, H', W') uint8; C is 1 for the format "L".
        Raises:
            BadImageError: for an image so thin that nothing is left of it when it is resized.
        """
        format = self.cfg.INPUT.FORMAT
        if format != "BGR":
            image = convert_PIL_to_numpy(Image.fromarray(image[:, :, ::-1]), format)
        transform = self._resize.get_transform(image)
        if min(getattr(transform, "new_h", 1), getattr(transform, "new_w", 1)) < 1:
            height, width = image.shape[:2]
            raise BadImageError(
                f"an image of {width} x {height} pixels is too thin: nothing of its shorter side is left "
                f"when the longer one has INPUT.MAX_SIZE_TEST {self.cfg.INPUT.MAX_SIZE_TEST} pixels"
            )
        resized = transform.apply_image(image)
        return torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))

    @torch.no_grad()
    def __call__(self, image: str | Path | Image.Image | np.ndarray) -> Instances:
        """Return the objects in one image, those with the highest scores first.

        Args:
            image: path, PIL image, or array (H, W, 3) uint8 in BGR as OpenCV reads it, the
                convention of Detectron2's DefaultPredictor. A path and a PIL image are turned upright
                by their EXIF orientation.
        Returns:
            Instances on the CPU with pred_boxes (x1, y1, x2, y2 in pixels), scores, pred_classes,
            class_names (array of str), and pred_masks (N, H, W) bool if the model has masks.
        Raises:
            BadImageError: for a path of an image that can't be read.
            ValueError: for another array, or a PIL image that `check_header` refuses.
        """
        if isinstance(image, Image.Image):
            check_header(image)
            array: np.ndarray = convert_PIL_to_numpy(_apply_exif_orientation(image), "BGR")
        else:
            array = image if isinstance(image, np.ndarray) else self.read(image)
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
            raise ValueError(
                f"an image is (H, W, 3) uint8, BGR; this is {tuple(array.shape)} {array.dtype}"
            )
        height, width = array.shape[:2]
        inputs = [{"image": self.to_tensor(array), "height": height, "width": width}]
        instances = self.model(inputs)[0]["instances"].to("cpu")
        instances = instances[instances.scores >= self.threshold]
        names = np.array(self.class_names, dtype=object)
        instances.class_names = names[instances.pred_classes.numpy()]
        return instances


def load_predictor(
    path: str | Path,
    device: str | torch.device | None = None,
    threshold: float = 0.5,
    cfg: CfgNode | None = None,
    fold: bool = True,
) -> Predictor:
    """Return a Predictor for a checkpoint, whose config and class names it holds.

    Args:
        path: a checkpoint of `Trainer`; reading it runs no code.
        device: "cuda" if there is one, else "cpu", if None.
        threshold: score below which objects are left out.
        cfg: the model's config, for a checkpoint that holds none.
        fold: replace MABN by stock layers that give the same predictions faster.
    Raises:
        CheckpointError: if the file holds no config, if its weights don't fit the config, or if its
            model finds no objects.
    """
    checkpoint = read_checkpoint(path)
    cfg = cfg or (config_of(checkpoint) if isinstance(checkpoint, dict) else None)
    if cfg is None:
        raise CheckpointError(
            f"{path} holds no config, which only checkpoints of mabn_d2 do: name the config file of its "
            "model (--config-file)"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = threshold
    cfg.freeze()
    try:
        model = build_model(cfg)
    except BUILD_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"no model can be built from the config of {path}: {reason}"
        ) from error
    if isinstance(model, (SemanticSegmentor, ProposalNetwork)):
        raise CheckpointError(
            f"MODEL.META_ARCHITECTURE of {path} is {cfg.MODEL.META_ARCHITECTURE!r}, which finds no objects "
            "of classes: use a checkpoint of a detector"
        )
    model = load_whole(model, checkpoint)
    if fold:
        model = fold_mabn(model)
    return Predictor(model.eval(), cfg, _classes(checkpoint, cfg), threshold)


def _classes(checkpoint: Mapping[str, Any], cfg: CfgNode) -> list[dict[str, Any]]:
    """Return the checkpoint's classes; numbered ones if it names none."""
    retina = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    number = (cfg.MODEL.RETINANET if retina else cfg.MODEL.ROI_HEADS).NUM_CLASSES
    classes = classes_of(checkpoint)
    if classes is None:
        return [{"id": i + 1, "name": f"class {i + 1}"} for i in range(number)]
    if len(classes) != number:
        raise CheckpointError(
            f"the checkpoint names {len(classes)} classes, and its model has {number}: use another "
            "file"
        )
    return classes
