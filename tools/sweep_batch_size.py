#!/usr/bin/env python
"""Trains norms x normalization batch sizes x seeds and draws test error against batch size.

Without --data: a small network on the digit crops, a minute a run on one core of a CPU. With --data DIR:
what follows "--" is handed to train_imagenet.py, as in: sweep_batch_size.py --data DIR -- --amp.
Runs that sweep.csv lists are not repeated; one that was cut short goes on from its checkpoint.
Writes to --output: sweep.csv (a line a run), sweep.png, table.md (mean and sample standard deviation).
"""

import argparse
import csv
import io
import itertools
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
import zlib
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import matplotlib
import torch
import train_imagenet
from tabulate import tabulate

from mabn_d2.checkpoint.io import atomic_file
from mabn_d2.classification.digit_crops import make_digit_crops

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

# Top-1 error, %, ImageNet, ResNet-50 (the paper's table).
PUBLISHED = {("bn", 32): 23.41, ("bn", 2): 35.22, ("brn", 2): 30.29, ("mabn", 2): 23.67}
DIGITS_FOLDER = "datasets/digit_crops"
DIGITS = (
    "--arch small --epochs 10 --epoch-iters 0 --lr 0.02 --schedule cosine --crop 32 "
    "--val-resize 32 --no-augment --label-smoothing 0 --workers 0 "
    "--log-period 150"
).split()
DIGITS_ITERS = 1500
# The defaults are for schedules of 130,000 iterations and more: the same shares of this one.
DIGITS_OPTIONS = {
    "brn": {
        name: DIGITS_ITERS * iters // 130_000
        for name, iters in (("warmup_iters", 5000), ("r_max_iter", 40000), ("d_max_iter", 25000))
    },
}
FIELDS = (
    "norm",
    "norm_batch",
    "seed",
    "top1_error",
    "train_loss",
    "minutes",
    "torch",
    "device",
    "commit",
    "settings",
)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", metavar="DIR", help="image folder; default: the digit crops, made if missing")
    add(
        "--output",
        metavar="DIR",
        help="default: results/batch_size, with --data results/batch_size_<name of its folder>",
    )
    add("--runs", metavar="DIR", help="checkpoints and logs of the runs; default: OUTPUT/runs")
    add(
        "--norms",
        nargs="+",
        default=["bn", "brn", "mabn", "gn"],
        choices=train_imagenet.norm_names(),
    )
    add("--sizes", nargs="+", type=int, default=[2, 32, 8, 4], help="normalization batches")
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--jobs", type=int, help="runs at a time; default: a core each, with --data one")
    add("--draw-only", action="store_true")
    add("rest", nargs="*", help="further arguments of train_imagenet.py, after --")
    args = parser.parse_args()
    own = "" if args.data is None else f"_{Path(args.data).resolve().name}"
    args.output = Path(args.output or f"results/batch_size{own}")
    args.runs = Path(args.runs or args.output / "runs")
    return args


def read_rows(path):
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS)
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def settings(args, norm):
    """Return the arguments of train_imagenet.py that all runs of a norm share."""
    if args.data is not None:
        return ["--data", args.data, *args.rest]
    options = [f"--norm-option={name}={n}" for name, n in DIGITS_OPTIONS.get(norm, {}).items()]
    return ["--data", DIGITS_FOLDER, *DIGITS, *options, *args.rest]


def commit():
    """Return the commit of this file, with a + if files differ from it; "" where there is no git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def train(arguments, runs, norm, size, seed, threads, commit):
    """Train one network, or go on where it was interrupted, and return its row."""
    if threads:
        torch.set_num_threads(threads)
    # Runs of other settings have other folders.
    folder = runs / f"{norm}_{size}_seed{seed}_{zlib.crc32(' '.join(arguments).encode()):08x}"
    resumed = (folder / "checkpoint.pth").exists()
    start = time.perf_counter()
    args = train_imagenet.parse_args(
        [
            *arguments,
            "--output",
            str(folder),
            "--norm",
            norm,
            "--norm-batch",
            str(size),
            "--seed",
            str(seed),
            "--resume",
            "auto",
        ]
    )
    result = train_imagenet.main(args)
    # Nobody knows what the first part of a resumed run took.
    minutes = "" if resumed else f"{(time.perf_counter() - start) / 60:.2f}"
    numbers = f"{result['top1_error']:.2f}", f"{result['train_loss']:.4f}", minutes
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    conditions = torch.__version__, device, commit, " ".join(arguments)
    return dict(zip(FIELDS, (norm, str(size), str(seed), *numbers, *conditions), strict=True))


def sweep(args, rows, path):
    """Train what `rows` lacks, write each row to `path` when it is there; return what failed."""
    if args.data is None:
        make_digit_crops(DIGITS_FOLDER)
    done = {(row["norm"], row["norm_batch"], row["seed"]): row["settings"] for row in rows}
    runs = []
    for seed, size, norm in itertools.product(args.seeds, args.sizes, args.norms):
        arguments = settings(args, norm)
        known = done.get((norm, str(size), str(seed)))
        if known is None and (norm != "gn" or size == args.sizes[0]):
            runs.append((arguments, args.runs, norm, size, seed))
        elif known not in (None, " ".join(arguments)):
            raise ValueError(f"{path} has {norm} {size} of other settings: name another --output")
    jobs = args.jobs or (1 if args.data else os.cpu_count())
    jobs = max(1, min(jobs, len(runs)))
    threads = max(1, os.cpu_count() // jobs) if jobs > 1 else 0
    version, failed, futures = commit(), [], {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            while runs or futures:
                while runs and len(futures) < jobs:  # no more, so that none begins after a signal
                    run = runs.pop(0)
                    futures[pool.submit(train, *run, threads, version)] = run
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    *_, norm, size, seed = futures.pop(future)
                    try:
                        rows.append(future.result())
                    except Exception as error:  # the others go on
                        failed.append(f"{norm} {size} seed {seed}: {error}")
                        print(failed[-1], file=sys.stderr, flush=True)
                    else:
                        write_rows(path, rows)
                        print({name: rows[-1][name] for name in FIELDS[:-1]}, flush=True)
        except BaseException:  # a signal: the runs write their checkpoints and end
            for child in multiprocessing.active_children():
                child.terminate()
            raise
    return failed


def summary(rows):
    """Return {norm: {normalization batch: (mean, sample standard deviation, seeds)}} of the errors.

    The batch of GroupNorm, which knows none, is 0.
    """
    errors = {}
    for row in rows:
        size = 0 if row["norm"] == "gn" else int(row["norm_batch"])
        errors.setdefault(row["norm"], {}).setdefault(size, []).append(float(row["top1_error"]))
    return {
        norm: {
            size: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0, len(v))
            for size, v in sorted(points.items())
        }
        for norm, points in errors.items()
    }


def table(rows):
    """Return the summary as Markdown."""
    found = summary(rows)
    sizes = sorted({size for points in found.values() for size in points if size})
    lines = []
    for norm, points in found.items():
        cells = {
            s: f"{mean:.1f}" + f" ± {std:.1f}" * (n > 1) for s, (mean, std, n) in points.items()
        }
        if norm == "gn":
            lines.append(["GN, which knows no batch", cells[0]])
        else:
            lines.append([norm.upper(), *(cells.get(size) for size in sizes)])
    return tabulate(lines, ["normalization batch", *sizes], "github", disable_numparse=True)


def draw(rows, path, title):
    """Draw mean and sample standard deviation over the seeds against the normalization batch."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colours = dict(
        zip(train_imagenet.norm_names(), plt.rcParams["axes.prop_cycle"].by_key()["color"])
    )
    sizes = sorted({int(row["norm_batch"]) for row in rows})
    for norm, points in sorted(summary(rows).items()):
        if norm == "gn":
            points = dict.fromkeys(sizes, points[0])
        mean, std, seeds = (torch.tensor(values) for values in zip(*points.values()))
        x, label = list(points), f"{norm.upper()} ({seeds.min()} seeds)"
        axes.plot(x, mean, "--" if norm == "gn" else "o-", color=colours[norm], label=label)
        axes.fill_between(x, mean - std, mean + std, color=colours[norm], alpha=0.2)
    for norm in sorted({norm for norm, _ in PUBLISHED}):
        points = sorted((size, error) for (n, size), error in PUBLISHED.items() if n == norm)
        label = f"{norm.upper()}, published: ImageNet, ResNet-50"
        axes.plot(*zip(*points), "*", color=colours[norm], markeredgecolor="k", ms=12, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlabel="normalization batch (images)", ylabel="top-1 error (%)", title=title)
    axes.set_ylim(0, None)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "sweep.csv"
    rows = read_rows(path)
    failed = [] if args.draw_only else sweep(args, rows, path)
    if not rows:
        sys.exit("sweep_batch_size.py: " + ("; ".join(failed) or f"{path} has no runs to draw"))
    title = "digit crops, small network" if args.data is None else str(args.data)
    draw(rows, args.output / "sweep.png", f"{title}: batch 32 for SGD, smaller ones for the norm")
    with atomic_file(args.output / "table.md") as file:
        file.write(f"{table(rows)}\n".encode())
    if failed:
        sys.exit(
            f"sweep_batch_size.py: {len(failed)} runs failed, start again to repeat them: "
            + "; ".join(failed)
        )


if __name__ == "__main__":
    try:
        main()
    except (BrokenProcessPool, OSError, ValueError) as error:
        sys.exit(f"sweep_batch_size.py: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
