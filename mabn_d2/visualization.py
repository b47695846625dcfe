"""Pictures of a run: predictions beside the truth, curves of losses and AP."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")  # draws into files; before pyplot, which Detectron2's Visualizer imports

import matplotlib.pyplot as plt
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.detection_utils import read_image
from detectron2.utils.visualizer import Visualizer


def draw_predictions(cfg, model, path, num_images=6, min_score=0.5, scale=2.0):
    """Draw the masks predicted on the first images of DATASETS.TEST[0], the truth above them.

    Args:
        model: in evaluation mode on return, whatever it was.
        path: the picture to write, its format by suffix.
        min_score: instances below it are left out.
        scale: enlargement of the images.
    """
    dataset = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(dataset)
    truth = {record["image_id"]: record for record in DatasetCatalog.get(dataset)}
    model.eval()
    columns = []
    for inputs, _ in zip(build_detection_test_loader(cfg, dataset), range(num_images)):
        with torch.no_grad():
            instances = model(inputs)[0]["instances"].to("cpu")
        record = truth[inputs[0]["image_id"]]
        image = read_image(record["file_name"], "RGB")
        rows = (
            Visualizer(image, metadata, scale).draw_dataset_dict(record),
            Visualizer(image, metadata, scale).draw_instance_predictions(
                instances[instances.scores >= min_score]
            ),
        )
        columns.append(np.concatenate([row.get_image() for row in rows]))
    height = max(column.shape[0] for column in columns)
    # Images of unequal heights: white below the shorter ones.
    padded = [
        np.pad(c, ((0, height - len(c)), (0, 4), (0, 0)), constant_values=255) for c in columns
    ]
    figure, axes = plt.subplots(figsize=(2 * len(columns), 4.4), layout="constrained")
    axes.imshow(np.concatenate(padded, axis=1))
    axes.set_title(f"{dataset}: truth above, predictions (score >= {min_score}) below")
    axes.set_axis_off()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def read_metrics(folder):
    """Return the records of `folder`/metrics.json, one an iteration; later ones replace earlier.

    A run that was killed and resumed has written some iterations twice.
    """
    records = {}
    for line in (Path(folder) / "metrics.json").read_text().splitlines():
        record = json.loads(line)
        records.setdefault(record["iteration"], {}).update(record)
    return [records[iteration] for iteration in sorted(records)]


def plot_run(folder, path):
    """Plot losses and AP against iterations, from the metrics.json of Detectron2's writer."""
    records = read_metrics(folder)

    def series(name):
        pairs = [(r["iteration"] + 1, r[name]) for r in records if name in r]
        return zip(*pairs) if pairs else ((), ())

    figure, (losses, ap) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in sorted({key for r in records for key in r if "loss" in key}):
        losses.plot(*series(name), label=name, linewidth=2 if name == "total_loss" else 1)
    losses.set(xlabel="iteration", ylabel="loss (median of 20)", yscale="log")
    losses.legend(fontsize=8)
    for name, label in (("bbox/AP", "box AP"), ("segm/AP", "mask AP"), ("segm/AP50", "mask AP50")):
        ap.plot(*series(name), label=label, marker="o")
    ap.set(xlabel="iteration", ylabel="AP (%)", ylim=(0, None))
    ap.legend()
    for axes in (losses, ap):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
