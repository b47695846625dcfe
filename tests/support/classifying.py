"""Runs of tools/train_imagenet.py on a few digit crops."""

import json
import os
import sys

import torch

from mabn_d2.classification.arguments import parse_args
from mabn_d2.classification.digit_crops import CropParams, make_digit_crops
from mabn_d2.classification.training import train_classifier
from paths import ROOT

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",
}
RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def make_data(folder):
    return make_digit_crops(folder / "crops", CropParams(num_train=64, num_val=49))


def arguments(data, output, *more):
    return [
        str(a)
        for a in (
            "--data",
            data,
            "--output",
            output,
            "--arch",
            "small",
            "--crop",
            32,
            "--val-resize",
            32,
            "--batch-size",
            8,
            "--epochs",
            2,
            "--epoch-iters",
            3,
            "--workers",
            0,
            "--device",
            "cpu",
            "--lr",
            0.02,
            *more,
        )
    ]


def train(data, output, *more):
    return train_classifier(parse_args(arguments(data, output, *more)))


def load(output):
    return torch.load(output / "checkpoint.pth", weights_only=True)


def read_log(output, key):
    """Return the lines of log.json that have the key."""
    lines = [json.loads(line) for line in (output / "log.json").read_text().splitlines()]
    return [line for line in lines if key in line]


def damage(folder):
    """Truncate the first image and return its path."""
    path = sorted(folder.rglob("*.png"))[0]
    path.write_bytes(path.read_bytes()[:60])
    return str(path)
