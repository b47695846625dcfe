"""The runs of a comparison: a config for each, training, the result."""

import json
import math
import statistics
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm

from ..checkpoint.io import atomic_file
from ..engine import (
    ConfigError,
    Trainer,
    check_data,
    one_line_errors,
    read_config,
    setup_config,
)
from ..visualization import draw_predictions, read_metrics
from .rows import folder_of_row, parse_row, row_of_folder

# The parts of the model whose norm a row sets, and those that only some architectures use.
NODES = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
NODES_OF_ARCHITECTURE = {
    "RetinaNet": ("RETINANET",),
    "PanopticFPN": ("SEM_SEG_HEAD",),
    "SemanticSegmentor": ("SEM_SEG_HEAD",),
}
METRICS = [(task, ap) for task in ("bbox", "segm") for ap in ("AP", "AP50", "AP75")]


def make_config(args: Namespace, row: str, seed: int) -> CfgNode:
    """Return the config of one run: the config of the file with the row's norm and images.

    Args:
        args: the arguments of `compare`.
        row: as `parse_row` takes it.
        seed: seed of the run.

    Raises:
        ConfigError: if the row or the config is wrong.
    """
    norm, images, micro_batches, processes = parse_row(row)
    gpus = torch.cuda.device_count()
    if processes > 1 and gpus and (processes > gpus or args.num_gpus == 0):
        raise ConfigError(
            f"--rows {row!r} needs {processes} GPUs on a machine with GPUs ({gpus} here): hide them "
            "(CUDA_VISIBLE_DEVICES=-1) to train on the CPU"
        )
    architecture = read_config(str(args.config_file), args.opts).MODEL.META_ARCHITECTURE
    nodes = (*NODES, *NODES_OF_ARCHITECTURE.get(architecture, ()))
    settings = {
        "SOLVER.IMS_PER_BATCH": images * processes,
        "SOLVER.ACCUMULATION_STEPS": micro_batches,
        "SEED": seed,
        "OUTPUT_DIR": str(args.output / "runs" / folder_of_row(row) / f"seed{seed}"),
        **{f"MODEL.{node}.NORM": norm for node in nodes},
    }
    return setup_config(
        Namespace(
            config_file=str(args.config_file),
            opts=[*args.opts, *(part for item in settings.items() for part in item)],
            num_gpus=processes if processes > 1 else min(args.num_gpus, 1),
            num_machines=1,
            resume=True,
            eval_only=False,
        )
    )


def check_same_config(cfg: CfgNode) -> None:
    """Raise ConfigError if OUTPUT_DIR holds a run, finished or not, of another config."""
    path = Path(cfg.OUTPUT_DIR) / "config.yaml"
    if path.exists():
        old, new = yaml.safe_load(path.read_text()), yaml.safe_load(cfg.dump())
        if old | {"OUTPUT_DIR": ""} != new | {"OUTPUT_DIR": ""}:  # a folder may be moved
            raise ConfigError(
                f"{path} is of another config: remove its folder and runs.csv, or name another "
                "--output"
            )


def runs_there(output: Path) -> list[tuple[str, int]]:
    """Return (row, seed) of the runs, finished or not, that the folder of a comparison has."""
    runs = []
    for path in sorted(output.glob("runs/*/seed*/config.yaml")):
        row, seed = row_of_folder(path.parts[-3]), path.parts[-2].removeprefix("seed")
        if row and seed.isdecimal():
            runs.append((row, int(seed)))
    return runs


def result_file(cfg: CfgNode) -> Path:
    """Return the file that a run writes last."""
    return Path(cfg.OUTPUT_DIR) / "result.json"


def _average_precision(results: dict, task: str, name: str) -> float:
    """Return an AP in %: 0 if the model found nothing, which Detectron2 reports as nan or not at all."""
    value = results.get(task, {}).get(name, math.nan)
    return 0.0 if math.isnan(value) else value


@one_line_errors()
def train(args: Namespace, row: str, seed: int) -> None:
    """Train a run to its end in each of its processes; the first process writes result.json."""
    cfg = make_config(args, row, seed)
    check_data(cfg)  # before default_setup writes to OUTPUT_DIR
    default_setup(cfg, Namespace(config_file=str(args.config_file), opts=args.opts))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    if not comm.is_main_process():
        return
    found = trainer._last_eval_results
    seconds = [record["time"] for record in read_metrics(cfg.OUTPUT_DIR) if "time" in record]
    result = {
        **{f"{task} {ap}": _average_precision(found, task, ap) for task, ap in METRICS},
        "s/iteration": statistics.median(seconds or [math.nan]),
        "iterations": cfg.SOLVER.MAX_ITER,
        "device": cfg.MODEL.DEVICE,
        "torch": torch.__version__,
    }
    model: Any = getattr(trainer.model, "module", trainer.model)
    draw_predictions(cfg, model, Path(cfg.OUTPUT_DIR) / "predictions.png")
    with atomic_file(result_file(cfg)) as file:
        file.write(json.dumps(result, indent=1).encode())
