"""Whole detectors as files that run without Detectron2 and without this package.

A folded detector (`fold_mabn`) has stock layers only, so it can be written as TorchScript, as ONNX,
or as a program of `torch.export`. The file takes one image and gives the boxes, classes, scores and
masks of the objects in it:

    image    (C, H, W) float32, 0-255, channels in the order of INPUT.FORMAT (one for "L"), resized
    boxes    (N, 4) float32, x1, y1, x2, y2 in pixels of this image
    classes  (N,) int64, positions in the list of class names
    scores   (N,) float32, the highest first
    masks    (N, H, W) bool, if the model has masks
"""

import contextlib
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers.mask_ops import _do_paste_mask
from detectron2.modeling.meta_arch import GeneralizedRCNN, PanopticFPN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn
from torch.utils import _pytree as pytree

from .checkpoint.io import check_writable
from .predictor import load_predictor

SUFFIXES = {"torchscript": ".pt", "onnx": ".onnx", "exported_program": ".pt2"}
FORMATS = tuple(SUFFIXES)
METADATA = "mabn_d2.json"  # name of the description within the file
MASK_THRESHOLD = 0.5
OPSET = 16  # the first with grid_sample, which pastes masks into the image
# Differences that an exported file may have: in boxes, of the image's longer side; in masks, of the
# pixels, where a probability is 0.5 up to rounding; in scores.
BOX_TOLERANCE, MASK_TOLERANCE = 1e-3, 1e-3
SCORE_TOLERANCE = 1e-3
TIE = 1e-4  # scores that differ by less are equal

_logger = logging.getLogger(__name__)


class ExportError(ValueError):
    """Why a model can't be exported: one line."""


class ExportableDetector(nn.Module):
    """One image -> boxes, classes, scores and, if the model has them, masks: tensors alone.

    Args:
        model: GeneralizedRCNN (Faster, Mask or Cascade R-CNN) or a dense detector (RetinaNet),
            built and folded.

    Raises:
        ExportError: for another meta-architecture, or for keypoints.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        kind = type(model).__name__
        if isinstance(model, PanopticFPN) or not isinstance(
            model, (GeneralizedRCNN, DenseDetector)
        ):
            raise ExportError(
                f"{kind} can't be exported as a whole: use Faster R-CNN, Mask R-CNN or RetinaNet"
            )
        if getattr(getattr(model, "roi_heads", None), "keypoint_on", False):
            raise ExportError("MODEL.KEYPOINT_ON is True: models with keypoints can't be exported")
        self.model = model

    @property
    def output_names(self) -> list[str]:
        """Names of what `forward` returns, in order."""
        names = ["boxes", "classes", "scores"]
        return names + (["masks"] if getattr(self._roi_heads, "mask_on", False) else [])

    @property
    def _roi_heads(self) -> nn.Module | None:
        return getattr(self.model, "roi_heads", None)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(C, H, W) -> boxes (N, 4), classes (N,), scores (N,), masks (N, H, W) bool."""
        inputs = [{"image": image}]
        if isinstance(self.model, GeneralizedRCNN):
            (instances,) = self.model.inference(inputs, do_postprocess=False)
        else:
            images = self.model.preprocess_image(inputs)
            features = self.model.backbone(images.tensor)
            features = [features[name] for name in self.model.head_in_features]
            predictions = self.model.head(features)
            (instances,) = self.model.forward_inference(images, features, predictions)
        boxes = instances.pred_boxes.tensor
        outputs: tuple[torch.Tensor, ...] = (boxes, instances.pred_classes, instances.scores)
        if "masks" in self.output_names:
            height, width = image.shape[-2:]
            masks, _ = _do_paste_mask(instances.pred_masks, boxes, height, width, skip_empty=False)
            outputs = (*outputs, masks >= MASK_THRESHOLD)
        return outputs


class DenseOutputs(nn.Module):
    """The part of a detector in front of the selection of boxes, whose shapes depend on no data.

    (C, H, W) -> the predictions of the RPN, or of RetinaNet's head, on each level of the pyramid: a
    list of scores (1, A * K, Hi, Wi) and a list of box offsets (1, A * 4, Hi, Wi).
    """

    def __init__(self, detector: ExportableDetector) -> None:
        super().__init__()
        self.model = detector.model

    def forward(self, image: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(C, H, W) -> scores and box offsets of each level."""
        images = self.model.preprocess_image([{"image": image}])
        features = self.model.backbone(images.tensor)
        if isinstance(self.model, GeneralizedRCNN):
            rpn = self.model.proposal_generator
            return rpn.rpn_head([features[name] for name in rpn.in_features])
        return self.model.head([features[name] for name in self.model.head_in_features])


def export_detector(
    model: nn.Module,
    format: str,
    output: str | Path,
    examples: Sequence[torch.Tensor],
    class_names: Sequence[str] = (),
    channel_order: str = "BGR",
    min_size: int | None = None,
    max_size: int | None = None,
) -> str:
    """Write a folded detector to a file, after the file has given what the model gives.

    Args:
        model: a detector in evaluation mode, on the CPU, what `fold_mabn` returns.
        format: one of FORMATS.
        output: the file. It is written whole or not at all.
        examples: images (C, H, W) float32, 0-255. The first one is traced. The file is then
            compared with the model on all of them; images of several sizes show that the file
            takes any size.
        class_names: written into the file, with `channel_order`, `min_size` and `max_size`.
        min_size, max_size: pixels that the shorter side of an image gets before it goes in, and the
            most that the longer side gets; 0: images are not resized.

    Returns:
        What was written, in one line; for "exported_program" it names what stops the whole model,
        and the part that was written.

    Raises:
        ExportError: if the model can't be exported, or the file gives something else.
    """
    if format not in FORMATS:
        raise ExportError(f"the format is {format!r}: use one of {', '.join(FORMATS)}")
    output = Path(output)
    detector = ExportableDetector(model).eval()
    description = {
        "class_names": list(class_names),
        "channel_order": channel_order,
        "min_size": min_size,
        "max_size": max_size,
        "inputs": ["image"],
        "outputs": detector.output_names,
    }
    write = {"torchscript": _torchscript, "onnx": _onnx, "exported_program": _program}[format]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
        file = Path(folder, f"detector{SUFFIXES[format]}")
        with torch.no_grad():
            said = write(detector, file, [e.float() for e in examples], description)
        os.replace(file, output)
    return said


def export_checkpoint(
    checkpoint: str | Path,
    format: str,
    output: str | Path,
    image_size: tuple[int, int] | None = None,
    images: Sequence[str | Path] = (),
    threshold: float = 0.05,
    cfg: CfgNode | None = None,
) -> str:
    """Fold the detector of a checkpoint and write it to a file; see `export_detector`.

    Args:
        checkpoint: a file that holds its config (`load_predictor`), or else with `cfg`.
        format: one of FORMATS.
        output: the file to write.
        image_size: (H, W) of the images that the file is traced with, in pixels; if None, what
            INPUT.MIN_SIZE_TEST makes of an image of 3:4. A program of `torch.export` takes this
            size only.
        images: files that the exported detector is compared with the model on, resized as in
            evaluation. Without them the comparison is on noise, in which a detector may find
            nothing.
        threshold: objects with lower scores are left out; fixed in the file.
        cfg: the model's config, for a checkpoint that holds none.

    Returns:
        What was written, in one line.

    Raises:
        CheckpointError: if the checkpoint can't be read or does not fit its config.
        ExportError: if the model can't be exported, or the file gives something else.
    """
    _check_output(Path(output), Path(checkpoint))
    if format == "onnx":
        _check_packages("onnx", "onnxruntime")
    predictor = load_predictor(checkpoint, "cpu", threshold, cfg)
    short = predictor.cfg.INPUT.MIN_SIZE_TEST
    height, width = image_size or (short, short * 4 // 3)
    if min(height, width) < 1:
        raise ExportError(f"the image size is {height}x{width}: both must be positive")
    noise = torch.Generator().manual_seed(0)
    examples = [
        torch.rand(len(predictor.cfg.MODEL.PIXEL_MEAN), *size, generator=noise) * 255
        for size in ((height, width), (width + 32, height))
    ]
    shown = [predictor.to_tensor(predictor.read(image)) for image in images]
    examples += shown
    others = [e for e in shown if e.shape != examples[0].shape]
    if format == "exported_program" and others:
        _logger.warning(
            f"{len(others)} of {len(shown)} images have another size than {height}x{width} when they are "
            "resized, which a program of torch.export does not take: they are not compared; "
            "--image-size names the size"
        )
    settings = predictor.cfg.INPUT
    return export_detector(
        predictor.model,
        format,
        output,
        examples,
        predictor.class_names,
        settings.FORMAT,
        settings.MIN_SIZE_TEST,
        settings.MAX_SIZE_TEST,
    )


def _check_output(output: Path, checkpoint: Path) -> None:
    if output.is_dir():
        raise ExportError(f"the output {output} is a folder: name a file")
    if output.exists() and checkpoint.exists() and output.samefile(checkpoint):
        raise ExportError(f"the output {output} is the checkpoint: name another file")
    try:
        check_writable(output.parent)
    except OSError as error:
        raise ExportError(
            f"the output {output} can't be written ({error}): name another file"
        ) from error


def _check_packages(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"the format onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}, or "
            "'mabn_d2[export]'"
        )


def _torchscript(
    detector: ExportableDetector, file: Path, examples: list[torch.Tensor], description: dict
) -> str:
    with _tracing():
        traced = torch.jit.trace(detector, (examples[0],), check_trace=False)
    traced.save(str(file), _extra_files={METADATA: json.dumps(description)})
    loaded = torch.jit.load(str(file))
    _compare(detector, lambda image: loaded(image), examples)
    return "the whole detector as TorchScript; torch and torchvision run it"


def _onnx(
    detector: ExportableDetector, file: Path, examples: list[torch.Tensor], description: dict
) -> str:
    import onnx
    import onnxruntime

    with _tracing():
        torch.onnx.export(
            detector,
            (examples[0],),
            str(file),
            dynamo=False,  # the other exporter goes by torch.export, see `_program`
            opset_version=OPSET,
            input_names=["image"],
            output_names=description["outputs"],
            dynamic_axes={
                "image": {1: "height", 2: "width"},
                **{name: {0: "objects"} for name in description["outputs"]},
            },
        )
    graph = onnx.load(str(file))
    onnx.helper.set_model_props(graph, {METADATA: json.dumps(description)})
    onnx.save(graph, str(file))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    _compare(
        detector,
        lambda image: [torch.from_numpy(a) for a in session.run(None, {"image": image.numpy()})],
        examples,
    )
    return "the whole detector as ONNX; onnxruntime runs it"


def _program(
    detector: ExportableDetector, file: Path, examples: list[torch.Tensor], description: dict
) -> str:
    extra = {METADATA: json.dumps(description)}
    try:
        with _quiet():
            program = torch.export.export(detector, (examples[0],), strict=False)
    except Exception as error:  # torch.export raises its own kinds for each obstacle
        obstacle = _obstacle(error)
    else:
        torch.export.save(program, str(file), extra_files=extra)
        loaded = torch.export.load(str(file)).module()
        _compare(detector, loaded, [e for e in examples if e.shape == examples[0].shape])
        return "the whole detector as a program of torch.export, for images of one size"
    part = DenseOutputs(detector).eval()
    with _quiet():
        program = torch.export.export(part, (examples[0],), strict=False)
    torch.export.save(
        program, str(file), extra_files={METADATA: json.dumps(description | {"outputs": "dense"})}
    )
    loaded, wanted = torch.export.load(str(file)).module(), part(examples[0])
    for found, expected in zip(
        pytree.tree_leaves(loaded(examples[0])), pytree.tree_leaves(wanted), strict=True
    ):
        if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
            raise ExportError("the file predicts something else than the model")
    return (
        "only backbone, FPN and the head that predicts boxes on them, for images of one size, as a "
        f"program of torch.export, because {obstacle}"
    )


def _obstacle(error: Exception) -> str:
    """Return the line of a torch.export error that names the operator or the code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if line.startswith("The following call raised this error"):
            where = lines[number + 1].rpartition(" in ")[2]
            return f"it stops at `{lines[number + 2]}` in {where}, which depends on data"
    return f"it stops: {lines[0][:200] if lines else type(error).__name__}"


def _most_objects(model: Any) -> int:
    """Return TEST.DETECTIONS_PER_IMAGE of a built detector."""
    if isinstance(model, DenseDetector):
        return model.max_detections_per_image
    predictor = model.roi_heads.box_predictor
    if isinstance(predictor, nn.ModuleList):  # Cascade R-CNN
        predictor = predictor[-1]
    return predictor.test_topk_per_image


def _compare(
    detector: ExportableDetector, exported: Callable, examples: list[torch.Tensor]
) -> None:
    """Raise ExportError unless `exported` gives what the detector gives on every example."""
    objects, most = 0, _most_objects(detector.model)
    for image in examples:
        wanted, found = detector(image), list(exported(image))
        size = tuple(image.shape[1:])
        where = f"on an image of {size[0]}x{size[1]} pixels the file finds"
        if len(found[0]) != len(wanted[0]):
            raise ExportError(f"{where} {len(found[0])} objects, the model {len(wanted[0])}")
        objects += len(wanted[0])
        if not len(wanted[0]):
            continue
        if len(wanted[0]) >= most:
            # Of objects with equal scores at the limit of TEST.DETECTIONS_PER_IMAGE, either may be kept.
            clear = wanted[2] > wanted[2].min() + TIE
            found, wanted = ([values[clear] for values in outputs] for outputs in (found, wanted))
            if not clear.any():
                continue
        if not torch.equal(found[1], wanted[1]):
            raise ExportError(f"{where} other classes than the model")
        difference = (found[2] - wanted[2]).abs().max().item()
        if difference > SCORE_TOLERANCE:
            raise ExportError(f"{where} scores that differ from the model's by {difference:.3g}")
        difference = (found[0] - wanted[0]).abs().max().item()
        if difference > BOX_TOLERANCE * max(size):
            raise ExportError(f"{where} boxes that differ from the model's by {difference:.3g}")
        masks = [(a != b).float().mean().item() for a, b in zip(found[3:], wanted[3:], strict=True)]
        if any(share > MASK_TOLERANCE for share in masks):
            raise ExportError(f"{where} masks that differ in {masks[0]:.2%} of the pixels")
    if not objects:
        _logger.warning(
            "the model finds nothing in the images that the file was compared with it on: name "
            "images with objects in them"
        )


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """Let `len` of Detectron2's structures be traced, without warnings."""
    from detectron2.export.torchscript_patch import patch_builtin_len  # imports torch's exporters

    with patch_builtin_len(), _quiet():
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what tracing says about constants that are constants here on purpose."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
