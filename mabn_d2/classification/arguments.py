"""The arguments of a classifier's training."""

import argparse
import math
from collections.abc import Sequence

import torch

from ..modeling.norm_table import parse_norm_options
from .models import ARCHS, WITHOUT_NORM_BATCH, build_classifier, norm_names

# What the values of arguments must be.
POSITIVE = "norm_batch simulated_batch batch_size epochs lr crop val_resize log_period".split()
NOT_NEGATIVE = "epoch_iters warmup_epochs weight_decay workers seed checkpoint_period".split()
SHARES = ("momentum", "label_smoothing")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Trains and tests classifiers on an image folder, with normalization batches of "
        "any size. One process: tools/train_imagenet.py --data DIR. Eight GPUs: torchrun "
        "--nproc_per_node 8 tools/train_imagenet.py --data DIR, or SLURM's srun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="with train/<class>/* and val/<class>/*")
    add("--output", default="output/imagenet", metavar="DIR", help="checkpoint.pth, logs")
    add("--arch", default="resnet50", choices=(*ARCHS, "small"))
    add("--norm", default="mabn", choices=norm_names())
    add("--norm-batch", type=int, default=2, help="images in one normalization batch")
    add("--simulated-batch", type=int, default=32, help="images that MABN's windows span")
    add(
        "--norm-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of MABN2d or BatchRenorm2d; may be repeated",
    )
    add("--batch-size", type=int, default=32, help="images of one GPU in one iteration")
    add("--epochs", type=int, default=120)
    add(
        "--epoch-iters",
        type=int,
        default=5000,
        help="iterations of an epoch; 0: as many as the images fill",
    )
    add("--lr", type=float, default=0.1, help="the paper's, for 256 images an iteration")
    add("--schedule", default="step", choices=("step", "cosine"))
    add("--steps", type=int, nargs="*", default=[30, 60, 90], help="epochs; each divides it by 10")
    add("--warmup-epochs", type=float, default=0.0, help="epochs in which the rate grows linearly")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=1e-4)
    add("--label-smoothing", type=float, default=0.1)
    add("--crop", type=int, default=224, help="pixels, of training and test images")
    add("--val-resize", type=int, default=256, help="shorter side before the centre crop")
    add("--no-augment", action="store_true", help="training images are only resized")
    add(
        "--bgr255",
        action="store_true",
        help="input as published: BGR levels of 0-255 as they are; otherwise torchvision's",
    )
    add("--amp", action="store_true", help="forward in bfloat16")
    add("--channels-last", action="store_true")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=8, help="loader processes of one GPU")
    add("--seed", type=int, default=0)
    add(
        "--strict",
        action="store_true",
        help="an image that can't be read is an error; otherwise it is skipped, counted and named",
    )
    add(
        "--resume",
        default="no",
        choices=("no", "auto"),
        help="auto: go on with the run in --output, if there is one",
    )
    add("--checkpoint-period", type=int, default=0, metavar="ITERATIONS", help="0: every epoch")
    add("--log-period", type=int, default=50, metavar="ITERATIONS")
    add("--test-only", action="store_true")
    add("--checkpoint", metavar="FILE", help="weights to test or to start from")
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Check everything that needs no data.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    for names, condition, allowed in (
        (POSITIVE, lambda value: 0 < value < math.inf, "above 0"),
        (NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "0 or more"),
        (SHARES, lambda value: 0 <= value <= 1, "from 0 to 1"),
    ):
        for name in names:
            if not condition(value := getattr(args, name)):
                raise ValueError(f"--{name.replace('_', '-')} {value}: use a number {allowed}")
    if args.warmup_epochs >= args.epochs:
        raise ValueError(
            f"--warmup-epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}: use less"
        )
    if args.test_only and not args.checkpoint:
        raise ValueError("--test-only needs --checkpoint FILE")
    # A test normalizes by the running statistics, whatever its batch is.
    splits = args.norm not in WITHOUT_NORM_BATCH and not args.test_only
    if splits and args.norm_batch > args.batch_size:
        raise ValueError(
            f"--norm-batch {args.norm_batch} is larger than --batch-size {args.batch_size}: use at most "
            f"{args.batch_size}"
        )
    _check_device(args.device)
    _check_norm(args)


def _check_device(name: str) -> None:
    """Raise ValueError if there is no such device."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}, but torch sees {torch.cuda.device_count()} CUDA devices: use --device cpu"
        )


def _check_norm(args: argparse.Namespace) -> None:
    """Raise ValueError if --norm can't be built with its arguments."""
    options = parse_norm_options(args.norm_option)
    for name, own in (
        ("batch_size", "--norm-batch"),
        ("simulated_batch_size", "--simulated-batch"),
    ):
        if name in options:
            raise ValueError(f"--norm-option {name}={options[name]}: use {own} {options[name]}")
    try:
        with torch.device("meta"):  # every architecture has the same layers
            build_classifier(
                "small", args.norm, args.norm_batch, args.simulated_batch, 2, **options
            )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--norm {args.norm} with --norm-batch {args.norm_batch}, --simulated-batch "
            f"{args.simulated_batch}, --norm-option {args.norm_option}: {error}"
        ) from error
