#!/usr/bin/env python
"""Trains norms x normalization batch sizes x seeds and draws test error against batch size.

Without --data: a small network on the digit crops, a minute a run on one core of a CPU. With --data DIR:
what follows "--" is handed to train_imagenet.py, as in: sweep_batch_size.py --data DIR -- --amp.
Runs that sweep.csv lists are not repeated; one that was cut short goes on from its last epoch.
"""

import argparse
import csv
import io
import itertools
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import matplotlib
import torch

import train_imagenet
from mabn_d2.checkpoint.io import CheckpointError, atomic_file
from mabn_d2.data.digit_crops import make_digit_crops
from mabn_d2.data.images import ImagesError

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

# Top-1 error, %, ImageNet, ResNet-50 (the paper's table).
PUBLISHED = {("bn", 32): 23.41, ("bn", 2): 35.22, ("brn", 2): 30.29, ("mabn", 2): 23.67}
DIGITS = ("--arch small --epochs 10 --epoch-iters 0 --lr 0.02 --schedule cosine --crop 32 "
          "--val-resize 32 --no-augment --label-smoothing 0 --workers 0 "
          "--log-period 150").split()
DIGITS_ITERS = 1500
# The defaults are for schedules of 130,000 iterations and more: the same shares of this one.
DIGITS_OPTIONS = {
    "brn": {
        name: DIGITS_ITERS * iters // 130_000
        for name, iters in (("warmup_iters", 5000), ("r_max_iter", 40000), ("d_max_iter", 25000))
    },
}
FIELDS = ("norm", "norm_batch", "seed", "top1_error", "train_loss", "minutes", "settings")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", metavar="DIR", help="image folder; default: the digit crops, made if missing")
    add("--output", default="results/batch_size", metavar="DIR", help="sweep.csv, sweep.png")
    add("--runs", default="output/sweep", metavar="DIR", help="checkpoints and logs of the runs")
    add("--norms", nargs="+", default=["bn", "brn", "mabn", "gn"], choices=train_imagenet.NORMS)
    add("--sizes", nargs="+", type=int, default=[2, 32, 8, 4], help="normalization batches")
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--jobs", type=int, help="runs at a time; default: a core each, with --data one")
    add("--draw-only", action="store_true")
    add("rest", nargs="*", help="further arguments of train_imagenet.py, after --")
    return parser.parse_args()


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
    base = DIGITS if args.data is None else []
    options = DIGITS_OPTIONS.get(norm, {}) if args.data is None else {}
    return [*base, *(f"--norm-option={name}={value}" for name, value in options.items()), *args.rest]


def train(arguments, data, folder, norm, size, seed, threads):
    """Train one network, or go on where it was interrupted, and return its row."""
    if threads:
        torch.set_num_threads(threads)
    start = time.perf_counter()
    result = train_imagenet.main(
        train_imagenet.parse_args([
            *arguments, "--data", str(data), "--output", f"{folder}/{norm}_{size}_seed{seed}",
            "--norm", norm, "--norm-batch", str(size), "--seed", str(seed), "--resume", "auto",
        ])
    )
    minutes = (time.perf_counter() - start) / 60
    numbers = (f"{result['top1_error']:.2f}", f"{result['train_loss']:.4f}", f"{minutes:.2f}")
    row = (norm, str(size), str(seed), *numbers, " ".join(arguments))
    return dict(zip(FIELDS, row, strict=True))


def sweep(args, rows, path):
    """Train what `rows` lacks and write each row to `path` when it is there."""
    data = args.data or make_digit_crops("datasets/digit_crops")
    done = {(row["norm"], row["norm_batch"], row["seed"]): row["settings"] for row in rows}
    runs = []
    for seed, size, norm in itertools.product(args.seeds, args.sizes, args.norms):
        arguments = settings(args, norm)
        known = done.get((norm, str(size), str(seed)))
        if known is None and (norm != "gn" or size == args.sizes[0]):
            runs.append((arguments, data, args.runs, norm, size, seed))
        elif known not in (None, " ".join(arguments)):
            raise ValueError(f"{path} has {norm} {size} of other settings: name another --output")
    jobs = args.jobs or (1 if args.data else os.cpu_count())
    jobs = max(1, min(jobs, len(runs)))
    threads = max(1, os.cpu_count() // jobs) if jobs > 1 else 0
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train, *run, threads) for run in runs]):
            rows.append(future.result())
            write_rows(path, rows)
            print({name: rows[-1][name] for name in FIELDS[:-1]}, flush=True)


def draw(rows, path, title):
    """Draw mean and standard deviation over seeds against batch size; GroupNorm knows none."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colours = dict(zip(train_imagenet.NORMS, plt.rcParams["axes.prop_cycle"].by_key()["color"]))
    sizes = sorted({int(row["norm_batch"]) for row in rows})
    for norm in sorted({row["norm"] for row in rows}):
        errors = {}
        for row in rows:
            if row["norm"] == norm:
                errors.setdefault(int(row["norm_batch"]), []).append(float(row["top1_error"]))
        if norm == "gn":
            errors = dict.fromkeys(sizes, sum(errors.values(), []))
        x = sorted(errors)
        values = [torch.tensor(errors[size]) for size in x]
        mean = torch.stack([v.mean() for v in values])
        std = torch.stack([v.std(correction=0) for v in values])
        label = f"{norm.upper()} ({min(map(len, values))} seeds)"
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
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = read_rows(output / "sweep.csv")
    if not args.draw_only:
        sweep(args, rows, output / "sweep.csv")
    if not rows:
        sys.exit(f"sweep_batch_size.py: {output / 'sweep.csv'} has no runs to draw")
    title = "digit crops, small network" if args.data is None else str(args.data)
    draw(rows, output / "sweep.png", f"{title}: batch 32 for SGD, smaller ones for the norm")


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, FloatingPointError, ImagesError, TypeError, ValueError) as error:
        sys.exit(f"sweep_batch_size.py: {error}")
