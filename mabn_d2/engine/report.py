"""What a finished training shows: pictures, curves, AP of each class, and the next command."""

import logging
import math
import shlex
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from tabulate import tabulate

from ..command_names import name_commands
from ..visualization import draw_predictions, plot_run
from .hooks import BestCheckpoint

METRICS = ("AP", "AP50", "AP75")
TASKS = {"bbox": "box", "segm": "mask", "keypoints": "keypoints"}


def report_run(trainer: DefaultTrainer) -> str:
    """Draw predictions.png and curves.png into OUTPUT_DIR, and return a summary as text.

    Returns:
        Tables of AP, the pictures' paths and the command that predicts; "" on all ranks but the main
        one, and without DATASETS.TEST.
    """
    cfg = trainer.cfg
    if not comm.is_main_process() or not cfg.DATASETS.TEST:
        return ""
    folder = Path(cfg.OUTPUT_DIR)
    lines, iterations = [], min(trainer.iter + 1, trainer.max_iter)
    results = trainer._last_eval_results
    # Detectron2 leaves the set's name out if there is one set only.
    sets = results if len(cfg.DATASETS.TEST) > 1 else {cfg.DATASETS.TEST[0]: results}
    for name, result in sets.items():
        lines += [f"{name} after {iterations} iterations, in %:", ap_tables(name, result), ""]
    curves, pictures = folder / "curves.png", folder / "predictions.png"
    plot_run(folder, curves)
    draw_predictions(cfg, getattr(trainer.model, "module", trainer.model), pictures)
    weights = folder / "model_best.pth"
    if not weights.is_file():
        weights = folder / "model_final.pth"
    best = next((hook.best for hook in trainer._hooks if isinstance(hook, BestCheckpoint)), None)
    if best is not None and best.value is not None:
        lines.append(f"best:     {best.metric} {best.value:.2f} after {best.iterations} iterations")
    lines += [
        f"pictures: {pictures}, {curves}",
        f"weights:  {weights}",
        f"predict:  tools/predict.py --checkpoint {shlex.quote(str(weights))} photos/*.jpg --output predictions",
    ]
    return name_commands("\n".join(lines))


def ap_tables(dataset_name: str, results: dict[str, dict[str, float]]) -> str:
    """Return a table of AP, and of the AP of each class, from the results of COCO's evaluation.

    Classes come in the order of the dataset. A class that the images do not have has no AP: "-".
    """
    tasks = [task for task in TASKS if task in results]
    if not tasks:
        return tabulate(
            [
                [task, name, f"{value:.1f}"]
                for task in results
                for name, value in results[task].items()
            ],
            headers=["", "", ""],
            tablefmt="github",
        )
    rows = [[TASKS[task], *(_percent(results[task], name) for name in METRICS)] for task in tasks]
    text = tabulate(rows, headers=["", *METRICS], tablefmt="github", disable_numparse=True)
    classes = MetadataCatalog.get(dataset_name).get("thing_classes", [])
    rows = [
        [name, *(_percent(results[task], f"AP-{name}") for task in tasks)]
        for name in classes
        if any(f"AP-{name}" in results[task] for task in tasks)
    ]
    if rows:
        headers = ["class", *(f"{TASKS[task]} AP" for task in tasks)]
        text += "\n\n" + tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return text


def _percent(values: dict[str, Any], name: str) -> str:
    value = values.get(name, math.nan)
    return "-" if math.isnan(value) else f"{value:.1f}"


def log_report(trainer: DefaultTrainer) -> None:
    """Log `report_run` on the main process."""
    text = report_run(trainer)
    if text:
        logging.getLogger("detectron2").info(f"Finished:\n{text}")
