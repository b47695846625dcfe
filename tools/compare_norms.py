#!/usr/bin/env python
"""Trains one detector under several norms and compares them: the paper's table on a small scale.

    tools/compare_norms.py                                    # everything, resumed where it was left
    tools/compare_norms.py --rows MABN:2 BN:2 --seeds 0 --output output/quick --set SOLVER.MAX_ITER 500

A row is NORM:IMAGES, the images in one iteration, or NORM:IMAGESxPROCESSES, the images on each of
several processes: BN:2x4 and naiveSyncBN:2x4 see the same 8 images, in normalization batches of 2 and
of 8. Iterations and learning rate are those of the config for all rows, so a row of more images sees
more of them. A run that is finished is not repeated; one that was cut short goes on from its last
checkpoint; one of another config is refused.

Writes to --output: runs.csv (a line a run), table.md (mean and standard deviation over the seeds),
curves.png, predictions.png (the first seed's); the runs themselves lie in runs/.
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from detectron2.engine import default_setup
from detectron2.utils import comm
from tabulate import tabulate

from mabn_d2.checkpoint.io import atomic_file
from mabn_d2.engine import ConfigError, Trainer, launch, one_line_errors, setup_config
from mabn_d2.visualization import draw_predictions, plt, read_metrics

CONFIG = Path(__file__).parents[1] / "configs/digits/compare_mask_rcnn_R10_FPN.yaml"
ROWS = ("BN:2", "BRN:2", "GN:2", "MABN:2", "BN:8")
NODES = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
METRICS = [(task, ap) for task in ("bbox", "segm") for ap in ("AP", "AP50", "AP75")]


def parse_row(row):
    """Return norm, images on each process and processes of NORM:IMAGES or NORM:IMAGESxPROCESSES."""
    match = re.fullmatch(r"([^:]+):(\d+)(?:x([1-9]\d*))?", row)
    if not match:
        raise ConfigError(
            f"--rows {row!r}: write NORM:IMAGES or NORM:IMAGESxPROCESSES, such as MABN:2 or MABN:2x4"
        )
    norm, images, processes = match[1], int(match[2]), int(match[3] or 1)
    if "SyncBN" in norm and processes == 1:
        raise ConfigError(
            f"--rows {row!r}: {norm} is BN in the one process of this row: use BN:{images}, or "
            f"{norm}:{images}xPROCESSES"
        )
    return norm, images, processes


def make_config(args, row, seed):
    """Return the config of one run: that of the file, with the row's norm and images."""
    norm, images, processes = parse_row(row)
    gpus = torch.cuda.device_count()
    if processes > 1 and gpus and (processes > gpus or args.num_gpus == 0):
        raise ConfigError(
            f"--rows {row!r} takes {processes} GPUs where there are any ({gpus} here): hide them "
            "(CUDA_VISIBLE_DEVICES=-1) to train on the CPU"
        )
    settings = {
        "SOLVER.IMS_PER_BATCH": images * processes,
        "SEED": seed,
        "OUTPUT_DIR": str(args.output / "runs" / row.replace(":", "_") / f"seed{seed}"),
        **{f"MODEL.{node}.NORM": norm for node in NODES},
    }
    return setup_config(
        SimpleNamespace(
            config_file=str(args.config_file),
            opts=[*args.opts, *(part for item in settings.items() for part in item)],
            num_gpus=processes if processes > 1 else args.num_gpus,
            num_machines=1,
            resume=True,
            eval_only=False,
        )
    )


def check_same_config(cfg):
    """Raise ConfigError if OUTPUT_DIR holds a run, finished or not, of another config."""
    path = Path(cfg.OUTPUT_DIR) / "config.yaml"
    if path.exists():
        old, new = yaml.safe_load(path.read_text()), yaml.safe_load(cfg.dump())
        if old | {"OUTPUT_DIR": ""} != new | {"OUTPUT_DIR": ""}:  # a folder may be moved
            raise ConfigError(
                f"{path} is of another config: remove its folder, or name another --output"
            )


@one_line_errors()
def train(args, row, seed):
    """Train a run to its end in each of its processes; the first writes result.json."""
    cfg = make_config(args, row, seed)
    default_setup(cfg, SimpleNamespace(config_file=str(args.config_file), opts=args.opts))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    if not comm.is_main_process():
        return
    found = trainer._last_eval_results
    seconds = [record["time"] for record in read_metrics(cfg.OUTPUT_DIR) if "time" in record]
    result = {
        **{f"{task} {ap}": found[task][ap] for task, ap in METRICS},
        "s/iteration": statistics.median(seconds),
        "iterations": cfg.SOLVER.MAX_ITER,
        "device": cfg.MODEL.DEVICE,
        "torch": torch.__version__,
    }
    model = getattr(trainer.model, "module", trainer.model)
    draw_predictions(cfg, model, Path(cfg.OUTPUT_DIR) / "predictions.png")
    with atomic_file(result_file(cfg)) as file:
        file.write(json.dumps(result, indent=1).encode())


def result_file(cfg):
    """Return the file that a run writes last of all."""
    return Path(cfg.OUTPUT_DIR) / "result.json"


def write_table(results, folder):
    """Write runs.csv and table.md of {(row, seed): result}."""
    names = [f"{task} {ap}" for task, ap in METRICS]
    with atomic_file(folder / "runs.csv") as file:
        columns = ["row", "seed", *names, "s/iteration", "iterations", "device", "torch"]
        lines = [
            columns,
            *(
                [row, seed, *(result[c] for c in columns[2:])]
                for (row, seed), result in results.items()
            ),
        ]
        file.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())
    table = []
    for row in dict.fromkeys(row for row, _ in results):
        runs = [result for (r, _), result in results.items() if r == row]
        cells = [
            f"{statistics.mean(v):.1f}" + (f" ± {statistics.stdev(v):.1f}" if len(v) > 1 else "")
            for v in ([run[name] for run in runs] for name in names)
        ]
        seconds = statistics.mean(run["s/iteration"] for run in runs)
        table.append([row, len(runs), runs[0]["iterations"], *cells, f"{seconds:.3f}"])
    headers = ["norm:images", "seeds", "iterations", *names, "s/iteration"]
    text = tabulate(table, headers, tablefmt="github", disable_numparse=True)
    with atomic_file(folder / "table.md") as file:
        file.write(f"{text}\n".encode())


def plot_curves(folders, path):
    """Plot the total loss and AP of {row: [folder, ...]} against iterations, all seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    names = (("total_loss", "loss"), ("bbox/AP", "box AP (%)"), ("segm/AP", "mask AP (%)"))
    for number, (row, runs) in enumerate(folders.items()):
        for k, records in enumerate(map(read_metrics, runs)):
            for axis, (name, label) in zip(axes, names, strict=True):
                points = [(r["iteration"] + 1, r[name]) for r in records if name in r]
                axis.plot(*zip(*points), color=f"C{number}", alpha=0.8, label=None if k else row)
                axis.set(xlabel="iterations", ylabel=label)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_yscale("log")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_page(configs, path):
    """Draw the predictions of each row's first run, one below the other."""
    size = (8, 3.4 * len(configs))
    figure, axes = plt.subplots(len(configs), figsize=size, squeeze=False, layout="constrained")
    for axis, (row, cfg) in zip(axes.flat, configs.items(), strict=True):
        axis.imshow(plt.imread(Path(cfg.OUTPUT_DIR) / "predictions.png"))
        axis.set_title(row)
        axis.set_axis_off()
    figure.savefig(path, dpi=60)
    plt.close(figure)


@one_line_errors()
def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=CONFIG, help="what all rows share")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--num-gpus", type=int, default=1, help="0: CPU even if there is a GPU")
    parser.add_argument("--output", type=Path, default=Path("results/comparison"))
    parser.add_argument("--set", dest="opts", nargs="+", default=[], metavar="KEY VALUE")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    # All rows of a seed before the next: an early look is a fair one.
    runs = [(row, seed) for seed in args.seeds for row in args.rows]
    configs = {run: make_config(args, *run) for run in runs}
    for cfg in configs.values():
        check_same_config(cfg)
    results = {}
    for run, cfg in configs.items():
        if not result_file(cfg).exists():
            launch(train, parse_row(run[0])[2], dist_url="auto", args=(args, *run))
        results[run] = json.loads(result_file(cfg).read_text())
        write_table(results, args.output)
    folders = {row: [configs[row, seed].OUTPUT_DIR for seed in args.seeds] for row in args.rows}
    plot_curves(folders, args.output / "curves.png")
    first = {row: configs[row, args.seeds[0]] for row in args.rows}
    draw_page(first, args.output / "predictions.png")
    print((args.output / "table.md").read_text())


if __name__ == "__main__":
    main()
