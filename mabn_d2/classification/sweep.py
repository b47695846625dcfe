"""Trainings of one network for each norm, normalization batch and seed."""

import csv
import io
import itertools
import multiprocessing
import os
import sys
import time
import zlib
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path

import torch

from ..checkpoint.io import atomic_file
from ..engine.code_version import commit
from ..engine.launch import started_process
from .arguments import parse_args
from .digit_crops import make_digit_crops
from .models import WITHOUT_NORM_BATCH
from .sweep_report import draw, table
from .training import train_classifier

DIGITS_FOLDER = "datasets/digit_crops"
DIGITS = (
    "--arch small --epochs 10 --epoch-iters 0 --lr 0.02 --schedule cosine --crop 32 "
    "--val-resize 32 --no-augment --label-smoothing 0 --workers 0 "
    "--log-period 150"
).split()
DIGITS_ITERS = 1500
# The defaults are for schedules of 130,000 iterations and more: the same shares of this schedule.
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

# Of `train`: arguments, folder of all runs, norm, normalization batch, seed.
RunArguments = tuple[list[str], Path, str, int, int]


def run_sweep(args: Namespace) -> list[str]:
    """Train what is missing, draw all runs, and return what failed, one line a run.

    Args:
        args: `data`, a folder or None for the digit crops; `output` and `runs`, folders; `norms`,
            `sizes` and `seeds`, of which each combination is a run; `jobs`, runs at a time;
            `draw_only`; `rest`, further arguments of each training.

    Raises:
        ValueError: if `output` has runs with other settings, or there are none to draw.
    """
    path = args.output / "sweep.csv"
    rows = read_rows(path)
    failed = [] if args.draw_only else train_missing(args, rows, path)
    if not rows:
        raise ValueError("; ".join(failed) or f"{path} has no runs to draw")
    title = "digit crops, small network" if args.data is None else str(args.data)
    draw(rows, args.output / "sweep.png", f"{title}: batch 32 for SGD, smaller ones for the norm")
    with atomic_file(args.output / "table.md") as file:
        file.write(f"{table(rows)}\n".encode())
    return failed


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the finished runs of a sweep.csv."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write the finished runs, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS)
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def settings(args: Namespace, norm: str) -> list[str]:
    """Return the arguments that all trainings of a norm share."""
    if args.data is not None:
        return ["--data", args.data, *args.rest]
    options = [f"--norm-option={name}={n}" for name, n in DIGITS_OPTIONS.get(norm, {}).items()]
    return ["--data", DIGITS_FOLDER, *DIGITS, *options, *args.rest]


def missing_runs(args: Namespace, rows: Sequence[dict[str, str]], path: Path) -> list[RunArguments]:
    """Return the arguments of `train` for each run that `rows`, the content of `path`, lacks.

    Raises:
        ValueError: if a run is there with other settings.
    """
    for row in rows:
        if row["settings"] != " ".join(settings(args, row["norm"])):
            raise ValueError(
                f"{path} has {row['norm']} {row['norm_batch']} of other settings: name another --output"
            )
    done = {run_key(row["norm"], int(row["norm_batch"]), int(row["seed"])) for row in rows}
    runs: dict[tuple[str, int, int], RunArguments] = {}
    for seed, size, norm in itertools.product(args.seeds, args.sizes, args.norms):
        key = run_key(norm, size, seed)
        if key not in done and key not in runs:
            runs[key] = (settings(args, norm), args.runs, norm, size, seed)
            training_args(*runs[key])  # checked before anything is trained
    return list(runs.values())


def run_key(norm: str, size: int, seed: int) -> tuple[str, int, int]:
    """Return what tells a run from others: the size does not matter to some norms."""
    return norm, 0 if norm in WITHOUT_NORM_BATCH else size, seed


def training_args(
    arguments: Sequence[str], runs: Path, norm: str, size: int, seed: int
) -> Namespace:
    """Return the checked arguments of one training; see `train`."""
    # Runs of other settings have other folders.
    folder = runs / f"{norm}_{size}_seed{seed}_{zlib.crc32(' '.join(arguments).encode()):08x}"
    own = f"--norm {norm} --norm-batch {size} --seed {seed} --resume auto".split()
    return parse_args([*arguments, "--output", str(folder), *own])


def train(
    arguments: Sequence[str],
    runs: Path,
    norm: str,
    size: int,
    seed: int,
    threads: int,
    commit: str,
) -> dict[str, str]:
    """Train one network, or go on where it was interrupted, and return its row.

    Args:
        arguments: of the training.
        runs: folder of all runs.
        norm: as --norm takes it.
        size: images in one normalization batch.
        seed: of the run.
        threads: of torch; 0 leaves them as they are.
        commit: of the code.
    """
    if threads:
        torch.set_num_threads(threads)
    args = training_args(arguments, runs, norm, size, seed)
    resumed = (Path(args.output) / "checkpoint.pth").exists()
    start = time.perf_counter()
    result = train_classifier(args)
    # The time of the first part of a resumed run is not known.
    minutes = "" if resumed else f"{(time.perf_counter() - start) / 60:.2f}"
    numbers = f"{result['top1_error']:.2f}", f"{result['train_loss']:.4f}", minutes
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    conditions = torch.__version__, device, commit, " ".join(arguments)
    return dict(zip(FIELDS, (norm, str(size), str(seed), *numbers, *conditions), strict=True))


def train_missing(args: Namespace, rows: list[dict[str, str]], path: Path) -> list[str]:
    """Train what `rows` lacks; add each row and write it to `path`; return what failed."""
    if started := started_process():
        raise ValueError(
            f"{started.launcher} starts {started.world_size} processes, each of which would train the "
            "whole sweep: start one process (srun --ntasks 1, no torchrun)"
        )
    runs = missing_runs(args, rows, path)
    if args.data is None:
        make_digit_crops(DIGITS_FOLDER)
    args.output.mkdir(parents=True, exist_ok=True)
    total = len(runs)
    cores = os.cpu_count() or 1
    jobs = max(1, min(args.jobs or (1 if args.data else cores), total))
    threads = max(1, cores // jobs) if jobs > 1 else 0
    version, ended = commit(), 0
    failed: list[str] = []
    futures: dict[Future, RunArguments] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            while runs or futures:
                while runs and len(futures) < jobs:  # no more, so that none begins after a signal
                    run = runs.pop(0)
                    futures[pool.submit(partial(train, *run, threads, version))] = run
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    *_, norm, size, seed = futures.pop(future)
                    ended += 1
                    try:
                        rows.append(future.result())
                    except Exception as error:  # the other runs go on
                        failed.append(f"{norm} {size} seed {seed}: {error}")
                        print(f"run {ended} of {total}: {failed[-1]}", file=sys.stderr, flush=True)
                    else:
                        write_rows(path, rows)
                        row = {name: rows[-1][name] for name in FIELDS[:-1]}
                        print(f"run {ended} of {total}: {row}", flush=True)
        except BaseException:  # a signal: the runs write their checkpoints and end
            for child in multiprocessing.active_children():
                child.terminate()
            raise
    return failed
