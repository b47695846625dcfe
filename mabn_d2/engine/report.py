"""What a finished training shows: pictures, curves, AP of each class, and the next command."""

import logging
import math
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from ..checkpoint import read_checkpoint
from ..command_names import name_commands
from ..visualization import draw_predictions, plot_run, read_metrics
from .hooks import BestCheckpoint
from .hooks.best_checkpoint import TASKS as SCALAR_TASKS

METRICS = ("AP", "AP50", "AP75")
TASKS = {"bbox": "box", "segm": "mask", "keypoints": "keypoints"}


def report_run(trainer: DefaultTrainer) -> str:
    """Draw predictions.png and curves.png into OUTPUT_DIR, and return a summary as text.

    If model_best.pth is of an earlier iteration than the last one, it has tables too, and the pictures
    are of its predictions.

    Returns:
        Tables of AP, the pictures' paths and the command that predicts; "" on all ranks but the main
        one, and without DATASETS.TEST.
    """
    cfg = trainer.cfg
    if not comm.is_main_process() or not cfg.DATASETS.TEST:
        return ""
    folder, lines = Path(cfg.OUTPUT_DIR), []
    curves, pictures = folder / "curves.png", folder / "predictions.png"
    plot_run(folder, curves)
    # Detectron2 leaves the set's name out if there is one set only.
    results, iterations = trainer._last_eval_results, min(trainer.iter + 1, trainer.max_iter)
    sets = results if len(cfg.DATASETS.TEST) > 1 else {cfg.DATASETS.TEST[0]: results}
    lines += _tables(sets, f"after {iterations} iterations")
    weights, model = folder / "model_final.pth", getattr(trainer.model, "module", trainer.model)
    has_weights: AbstractContextManager[None] = nullcontext()
    best = next((hook.best for hook in trainer._hooks if isinstance(hook, BestCheckpoint)), None)
    if best is not None and best.value is not None:
        weights = folder / "model_best.pth"
        if best.iterations < iterations:
            sets = _written_results(cfg, best.iterations)
            lines += _tables(sets, f"after {best.iterations} iterations ({weights.name})")
            has_weights = _weights_of(weights, model)
        lines.append(f"best:     {best.metric} {best.value:.2f} after {best.iterations} iterations")
    with has_weights:
        draw_predictions(cfg, model, pictures)
    lines += [
        f"pictures: {pictures}, {curves}",
        f"weights:  {weights}",
        f"predict:  tools/predict.py --checkpoint {shlex.quote(str(weights))} photos/*.jpg --output predictions",
    ]
    return name_commands("\n".join(lines))


def _tables(sets: Mapping[str, dict], when: str) -> list[str]:
    return [f"{name} {when}, in %:\n{ap_tables(name, result)}\n" for name, result in sets.items()]


def _written_results(cfg: CfgNode, iterations: int) -> dict[str, Any]:
    """Return {test set: results} of the evaluation after some iterations, from metrics.json."""
    names, results = cfg.DATASETS.TEST, defaultdict[str, dict](lambda: defaultdict(dict))
    records = [r for r in read_metrics(cfg.OUTPUT_DIR) if r["iteration"] == iterations - 1]
    for dataset in names:
        front = f"{dataset}/" if len(names) > 1 else ""
        for scalar, value in records[0].items() if records else ():
            task, _, name = scalar.removeprefix(front).partition("/")
            if scalar.startswith(front) and task in SCALAR_TASKS:
                results[dataset][task][name] = value
    return results


@contextmanager
def _weights_of(file: Path, model: nn.Module) -> Iterator[None]:
    """Give the model the weights of a checkpoint of its own run for a while."""
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(read_checkpoint(file)["model"])
    try:
        yield
    finally:
        model.load_state_dict(own)


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
