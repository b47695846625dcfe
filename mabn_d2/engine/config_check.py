"""Checks a config before a run, for errors that would appear late or not at all."""

from collections.abc import Container

from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.utils.file_io import PathManager

from ..checkpoint import weights_file
from ..data.data_check import not_registered
from ..modeling.norm_table import NORMS
from .errors import ConfigError
from .hooks.best_checkpoint import TASKS, task_of
from .resume import check_output_folder, check_same_run
from .value_check import check_values, norm_nodes, used_norms, warn_of_window

# Iterations; each layer keeps two vectors of its channels for each.
MAX_WINDOW = 10_000

# torch's own, which takes no tensors on the CPU from several processes.
GPU_ONLY = ("SyncBN", "nnSyncBN")


def check_config(cfg: CfgNode, workers: int = 1, resume: bool = False, train: bool = True) -> None:
    """Check the settings, the output folder and the file of weights of a run.

    Args:
        workers: training processes on all machines.
        resume: weights come from OUTPUT_DIR if a checkpoint is there.
        train: False where the config is for evaluation only.
    Raises:
        ConfigError: naming the key, its value and the remedy.
    """
    check_settings(cfg, workers, train)
    if train:
        _check_output(cfg, resume)
    weights = cfg.MODEL.WEIGHTS
    resumes = resume and PathManager.isfile(f"{cfg.OUTPUT_DIR}/last_checkpoint")
    there = "://" in weights or PathManager.isfile(weights_file(weights))
    if weights and not resumes and not there:
        raise ConfigError(
            f"MODEL.WEIGHTS is {weights!r}, which does not exist: "
            + (
                "download R50-wc.pth, the ImageNet weights of the MABN authors "
                "(https://github.com/megvii-model/MABN), and run tools/convert_weights.py "
                f"imagenet R50-wc.pth {weights}"
                if weights.endswith("R50-wc.pth")
                else "correct the path, or set it to '' to start from random weights"
            )
        )


def check_settings(
    cfg: CfgNode, workers: int = 1, train: bool = True, own: Container[str] = ()
) -> None:
    """Check the values of a config against each other; no file is read.

    Args:
        workers: training processes on all machines.
        train: False where the config is for evaluation only.
        own: as in `check_values`.
    Raises:
        ConfigError: naming the key, its value and the remedy.
    """
    check_keys(cfg)
    check_values(cfg, train, own)
    images, steps = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS
    if steps < 1:
        raise ConfigError(
            f"SOLVER.ACCUMULATION_STEPS is {steps}: use 1 for no accumulation, or the number of "
            "micro-batches in one optimizer iteration"
        )
    if train and (images < workers * steps or images % (workers * steps)):
        if images < workers or images % workers:
            raise ConfigError(
                f"SOLVER.IMS_PER_BATCH is {images}, no multiple of the {workers} training processes "
                "(--num-gpus times --num-machines): change one"
            )
        share = images // workers
        fitting = [n for n in range(1, share + 1) if share % n == 0]
        raise ConfigError(
            f"SOLVER.ACCUMULATION_STEPS is {steps}, which does not divide the {share} images that "
            f"each process has of SOLVER.IMS_PER_BATCH {images}: use one of "
            f"{', '.join(map(str, fitting))}, or change IMS_PER_BATCH"
        )
    if train:
        _check_evaluation(cfg)
    for name, row in NORMS.items():
        try:
            layer = row.layer(1, **row.settings(cfg), device="meta")  # checks the values
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"MODEL.{name}: {error}") from error
        window = getattr(layer, "window", 0) if row.has_window else 0
        if window > MAX_WINDOW:
            raise ConfigError(
                f"MODEL.{name}.SIMULATED_BATCH_SIZE is {cfg.MODEL[name].SIMULATED_BATCH_SIZE}, which "
                f"is {window} iterations, more than {MAX_WINDOW}: the paper's is 16, of 32 images"
            )
    mabn = cfg.MODEL.MABN
    if train and mabn.BATCH_SIZE > 0 and "MABN" in used_norms(cfg):
        key = "MODEL.MABN.BATCH_SIZE"
        window, share = mabn.SIMULATED_BATCH_SIZE // mabn.BATCH_SIZE, images // (workers * steps)
        warn_of_window(mabn.BATCH_SIZE, window, share, key, f"{key} 0, the images of one forward")
    for key, node in norm_nodes(cfg):
        try:
            get_norm(node.NORM, 32)
        except KeyError as error:
            raise ConfigError(f"{key}.NORM: {error.args[0]}") from error
        if node.NORM in GPU_ONLY and train and workers > 1 and cfg.MODEL.DEVICE == "cpu":
            raise ConfigError(
                f"{key}.NORM is {node.NORM!r}, which needs GPUs where several processes train: use "
                '"naiveSyncBN", which runs on the CPU too'
            )
    for part in ("TRAIN", "TEST") if train else ("TEST",):
        if problem := not_registered(f"DATASETS.{part}", cfg.DATASETS[part]):
            raise ConfigError(problem)


def check_keys(cfg: CfgNode) -> None:
    """Raise ConfigError for a config without the keys of this package."""
    if "ACCUMULATION_STEPS" not in cfg.SOLVER:
        raise ConfigError(
            "the config has no SOLVER.ACCUMULATION_STEPS and other keys of mabn_d2: call "
            "mabn_d2.add_mabn_config(cfg) before merging the file"
        )


def _check_output(cfg: CfgNode, resume: bool) -> None:
    """OUTPUT_DIR can be written to, and holds no other run."""
    folder = cfg.OUTPUT_DIR
    resumes = check_output_folder(folder, resume, "OUTPUT_DIR")
    if resumes and PathManager.isfile(f"{folder}/config.yaml"):
        with PathManager.open(f"{folder}/config.yaml") as file:
            check_same_run(cfg, file.read(), f"{folder}/config.yaml")


def _check_evaluation(cfg: CfgNode) -> None:
    """Keys of what follows from an evaluation: the best checkpoint, early stopping."""
    metric, patience = cfg.TEST.BEST_METRIC, cfg.SOLVER.EARLY_STOPPING_PATIENCE
    task, name = task_of(metric), metric.rpartition("/")[2]
    if metric not in ("", "auto") and (task not in TASKS or not name):
        raise ConfigError(
            f'TEST.BEST_METRIC is {metric!r}: use "auto", "" or a scalar of the evaluation, such as '
            '"bbox/AP", "segm/AP50" or "validation/total_loss"'
        )
    names, in_front = cfg.DATASETS.TEST, metric.removesuffix(f"{task}/{name}").rstrip("/")
    if task and names and in_front not in (names if len(names) > 1 else ("",)):
        front = f"{names[0]}/" if len(names) > 1 else ""
        raise ConfigError(
            f"TEST.BEST_METRIC is {metric!r}, but the scalars of DATASETS.TEST {list(names)} have "
            f"{'the name of a set' if front else 'no name'} in front: use {front}{task}/{name}"
        )
    if task == "keypoints" and not cfg.MODEL.KEYPOINT_ON:
        raise ConfigError(
            f"TEST.BEST_METRIC is {metric!r}, but MODEL.KEYPOINT_ON is False: use bbox/{name}"
        )
    if task == "validation" and not cfg.TEST.VALIDATION_LOSS:
        raise ConfigError(f"TEST.BEST_METRIC is {metric!r}, which needs TEST.VALIDATION_LOSS True")
    if task == "segm" and not cfg.MODEL.MASK_ON:
        raise ConfigError(
            f"TEST.BEST_METRIC is {metric!r}, but MODEL.MASK_ON is False: use bbox/{name}"
        )
    if patience < 0:
        raise ConfigError(
            f"SOLVER.EARLY_STOPPING_PATIENCE is {patience}: use 0 to train to the end, or a number of "
            "evaluations"
        )
    for needed, why in (
        (metric, 'TEST.BEST_METRIC, which is empty: use "auto"'),
        (
            cfg.TEST.EVAL_PERIOD > 0,
            f"TEST.EVAL_PERIOD, which is {cfg.TEST.EVAL_PERIOD}: set it to some iterations",
        ),
        (cfg.DATASETS.TEST, "DATASETS.TEST, which is empty: name a dataset"),
    ):
        if patience > 0 and not needed:
            raise ConfigError(f"SOLVER.EARLY_STOPPING_PATIENCE is {patience}, which needs {why}")
