"""Pictures of a run: predictions beside the truth, curves of losses and AP.

Figures are drawn into files without pyplot: matplotlib's backend, which a notebook has chosen, stays.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import inference_context
from detectron2.utils.visualizer import VisImage, Visualizer
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from .checkpoint.io import atomic_file
from .data.errors import one_line
from .data.loader import add_test_proposals

# Families for letters that matplotlib's own font lacks; those that are installed are used.
FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "WenQuanYi Micro Hei",
    "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Malgun Gothic",
    "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai",
    "Arial Unicode MS",
)  # fmt: skip
NUM_PROPOSALS = 10  # proposals that are drawn, of a thousand
PICTURE_SIZE = 320  # pixels of the longer side of an image that is drawn

_logger = logging.getLogger(__name__)


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4.5), **settings: Any
) -> tuple[Figure, Any]:
    """Return a figure and its axes, as `matplotlib.pyplot.subplots`, without pyplot.

    Args:
        rows, columns: of the grid of axes.
        size: width and height in inches.
        settings: of `Figure.subplots`.
    """
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **settings)


def picture_formats() -> list[str]:
    """Return the suffixes that `save_figure` knows, without a dot."""
    return sorted(Figure().canvas.get_supported_filetypes())


def save_figure(figure: Figure, path: str | PathLike, dpi: int = 100) -> None:
    """Write a figure whole, its format by suffix.

    Raises:
        CheckpointError: if the file can't be written.
        ValueError: for a suffix that is none of `picture_formats`.
    """
    path = Path(path)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=dpi, format=path.suffix.lstrip("."))


class AnyTextVisualizer(Visualizer):
    """Detectron2's Visualizer, for classes of any name.

    matplotlib takes the text between two dollar signs for mathematics, which may be an error.
    """

    def draw_text(self, text: str, position: tuple[float, float], **kwargs: Any) -> VisImage:
        """As Detectron2's."""
        output = super().draw_text(printable(text).replace("$", r"\$"), position, **kwargs)
        families = [name for name in FONTS if name in font_manager.get_font_names()]
        output.ax.texts[-1].set_fontfamily(["sans-serif", *families])
        return output


def printable(text: str) -> str:
    """Return a text on one line that does not steer the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def prediction_pictures(
    cfg: CfgNode, model: nn.Module, num_images: int = 6, min_score: float = 0.5
) -> Iterator[np.ndarray]:
    """Return pictures of the first images of DATASETS.TEST[0]: truth above, predictions below.

    Args:
        model: its mode is restored.
        num_images: at most so many pictures.
        min_score: instances below it are left out.

    Yields:
        (H, W, 3) uint8, RGB.
    """
    name = cfg.DATASETS.TEST[0]
    records = DatasetCatalog.get(name)[:num_images]
    add_test_proposals(cfg, name, records)
    return _pictures(name, records, DatasetMapper(cfg, False), model, min_score)


def pictures_of_dataset(
    dataset: str,
    mapper: Callable[[dict], dict],
    model: nn.Module,
    num_images: int,
    min_score: float = 0.5,
) -> Iterator[np.ndarray]:
    """As `prediction_pictures`, for a dataset and a mapper of evaluation."""
    return _pictures(dataset, DatasetCatalog.get(dataset)[:num_images], mapper, model, min_score)


def _pictures(
    dataset: str,
    records: list[dict],
    mapper: Callable[[dict], dict],
    model: nn.Module,
    min_score: float,
) -> Iterator[np.ndarray]:
    metadata = MetadataCatalog.get(dataset)
    loader = build_detection_test_loader(records, mapper=mapper, sampler=range(len(records)))
    with inference_context(model), torch.no_grad():
        for record, inputs in zip(records, loader, strict=True):
            output = model(inputs)[0]
            image = read_image(record["file_name"], "RGB")
            scale = PICTURE_SIZE / max(image.shape[:2])
            truth, found = (AnyTextVisualizer(image, metadata, scale) for _ in range(2))
            # What is drawn is of no use to the training, which an error here must not end.
            try:
                truth.draw_dataset_dict(_drawable(record))
                _draw_output(found, output, min_score)
            except Exception as error:
                reason = f"{type(error).__name__}: {one_line(error)}"
                _logger.warning(f"the picture of {record['file_name']} is incomplete: {reason}")
            yield np.concatenate([v.get_output().get_image() for v in (truth, found)])


def _drawable(record: dict) -> dict:
    """Return a record without what only some of its objects have.

    Detectron2 looks at the first object, and takes the others to have the same.
    """
    annotations = record.get("annotations", [])
    uneven = [
        key
        for key, sizes in (
            ("segmentation", {"segmentation" in a for a in annotations}),
            ("keypoints", {len(a.get("keypoints", ())) for a in annotations}),
        )
        if len(sizes) > 1
    ]
    drawn = [{k: v for k, v in a.items() if k not in uneven} for a in annotations]
    return {**record, "annotations": drawn}


def _draw_output(visualizer: Visualizer, output: dict[str, Any], min_score: float) -> VisImage:
    if "panoptic_seg" in output:
        segments, info = output["panoptic_seg"]
        return visualizer.draw_panoptic_seg(segments.to("cpu"), info)
    if "proposals" in output:
        boxes = output["proposals"].proposal_boxes[:NUM_PROPOSALS]  # the best come first
        return visualizer.overlay_instances(boxes=boxes.to("cpu"))
    if "sem_seg" in output and "instances" not in output:
        return visualizer.draw_sem_seg(output["sem_seg"].argmax(dim=0).to("cpu"))
    if "instances" not in output:  # a model of one's own
        return visualizer.get_output()
    instances = output["instances"].to("cpu")
    return visualizer.draw_instance_predictions(instances[instances.scores >= min_score])


def draw_predictions(
    cfg: CfgNode,
    model: nn.Module,
    path: str | PathLike,
    num_images: int = 6,
    min_score: float = 0.5,
) -> None:
    """Write one picture of `prediction_pictures`, side by side.

    Args:
        model: its mode is restored.
        path: the picture to write, its format by suffix.
    """
    columns = list(prediction_pictures(cfg, model, num_images, min_score))
    height = max(column.shape[0] for column in columns)
    # White below and between images of different sizes.
    padded = [
        np.pad(c, ((0, height - len(c)), (0, 4), (0, 0)), constant_values=255) for c in columns
    ]
    figure, axes = new_figure(size=(2 * len(columns), 4.4))
    axes.imshow(np.concatenate(padded, axis=1))
    axes.set_title(f"{cfg.DATASETS.TEST[0]}: truth above, predictions (score >= {min_score}) below")
    axes.set_axis_off()
    save_figure(figure, path, dpi=150)


def read_metrics(folder: str | PathLike) -> list[dict[str, float]]:
    """Return the records of `folder`/metrics.json, one for each iteration, in their order.

    A run that was killed and resumed has written some iterations twice: later values replace earlier
    ones. A line that was cut when the run was killed is left out.
    """
    records: dict[int, dict[str, Any]] = {}
    for line in (Path(folder) / "metrics.json").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records.setdefault(record["iteration"], {}).update(record)
    return [records[iteration] for iteration in sorted(records)]


def plot_run(folder: str | PathLike, path: str | PathLike) -> None:
    """Plot losses and AP against iterations, from the metrics.json of Detectron2's writer.

    Args:
        folder: that of the run.
        path: the picture to write, its format by suffix.
    """
    records = read_metrics(folder)
    names = {key for record in records for key in record}
    # The evaluation behind the last iteration has the number of the one that would follow.
    last = max((r["iteration"] for r in records if "total_loss" in r), default=math.inf)

    def plot(axes: Axes, name: str, label: str, **style: Any) -> None:
        points = [
            (min(r["iteration"], last) + 1, r[name])
            for r in records
            if math.isfinite(r.get(name, math.nan))
        ]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)

    figure, (losses, ap) = new_figure(1, 2, size=(11, 4))
    for name in sorted(name for name in names if "loss" in name and "/" not in name):
        plot(losses, name, name, linewidth=2 if name == "total_loss" else 1)
    for name in sorted(name for name in names if name.endswith("validation/total_loss")):
        plot(losses, name, name, linewidth=2, linestyle="--", marker="o")
    losses.set(xlabel="iteration", ylabel="loss (median of 20)", yscale="log")
    # bbox/AP, segm/AP50; with several test sets the set's name is in front.
    for name in sorted(
        name for name in names if name.rpartition("/")[2] in ("AP", "AP50", "PQ", "mIoU", "AR@1000")
    ):
        plot(ap, name, name, marker="o")
    ap.set(xlabel="iteration", ylabel="AP (%)", ylim=(0, None))
    for axes in (losses, ap):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    save_figure(figure, path, dpi=110)
