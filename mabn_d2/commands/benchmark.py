"""Times normalization layers against BatchNorm: alone, in a ResNet-50 at inference, in a detector at
inference and in training.

    tools/benchmark.py layer --dtype fp32,bf16 --threads 1,2 --output benchmarks/layer.json
    tools/benchmark.py layer --norms mabn_split,bn_split --shapes 32x64x56x56 --baseline mabn
    tools/benchmark.py layer --device cuda --dtype fp32,fp16,bf16 --formats nchw,nhwc --shapes r50_fpn
    tools/benchmark.py inference --norms bn,ln,in,gn,mabn --output benchmarks/inference.json
    tools/benchmark.py detector --norms frozen_bn,mabn,mabn_folded --output benchmarks/detector.json
    tools/benchmark.py step --norms bn,mabn --output benchmarks/step.json
    tools/benchmark.py accumulation --accumulation 8 --size 160 --output benchmarks/accumulation.json

Norms are timed in turn, round by round. A ratio compares times of one round: with BatchNorm; with ReLU,
with BatchNorm and ReLU; for a detector at inference, with Detectron2's FrozenBN; or with --baseline.
The table shows medians and quartiles. `formula` is MABN as plain tensor expressions; `_split` is the
classification form with normalization batches of 2 images; `mabn_folded` is the model that `fold_mabn`
makes from one with MABN, `mabn_folded_conv` the one without norms. `copy` is Tensor.copy_ of one
activation. `accumulation` compares a training step of --batch images (`micro`) with a step of
--accumulation times as many, as micro-batches (`accumulated`) and in one forward (`at_once`). `of copy` is the share of the copy's bandwidth that a layer reaches, if the layer reads and
writes activations 8 times as two passes in each direction do (x; x, y; dy, x; dy, x, dx). A picture of
the same name is written beside the JSON file.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from ..benchmark.layer_cases import DTYPES, FORMATS, R50_FPN
from ..benchmark.measure import CLOCKS
from ..benchmark.norms import DETECTORS, STEPS, choose_norms, known_norms
from ..benchmark.run import CASES, run_benchmark
from ..checkpoint.io import check_writable
from ..command_names import name_commands
from ..engine import one_line_errors


def listed(convert: Callable, text: str) -> list:
    """Parse a comma-separated list."""
    return [convert(part) for part in text.split(",")]


def choice(known: Iterable[str], text: str) -> str:
    """Return the text if it is one of the known words."""
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")
    return text


def shapes(text: str) -> Sequence[tuple[int, ...]]:
    """Parse shapes such as 2x64x128x128,2x256x64x64."""
    if text == "r50_fpn":
        return R50_FPN
    found = [tuple(int(size) for size in part.split("x")) for part in text.split(",")]
    if any(len(shape) != 4 or min(shape) < 1 for shape in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of NxCxHxW: 2x64x128x128,...")
    return found


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=name_commands(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", choices=CASES)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--dtype", default=["fp32"], type=partial(listed, partial(choice, DTYPES)))
    add("--norms", help="comma-separated; default: all of a detector, otherwise bn,mabn")
    add("--baseline", help="norm that all are compared with")
    add("--output", type=Path, help="JSON file; a PNG file is written beside it")
    add("--threads", default=[torch.get_num_threads()], type=partial(listed, int), help="1,2")
    add("--rounds", type=int, default=9)
    add("--round-seconds", type=float, default=0.05)
    add(
        "--formats",
        default=["nchw"],
        type=partial(listed, partial(choice, FORMATS)),
        help="nchw,nhwc",
    )
    add(
        "--shapes",
        default=[(2, 64, 128, 128), (2, 256, 64, 64), (2, 512, 32, 32)],
        type=shapes,
        help="layer: 2x64x128x128,... or r50_fpn, the shapes of 2 images of 800x1333",
    )
    add("--depth", default=[1], type=partial(listed, int), help="layer: norms in a row, 1,2,4")
    add("--batch", type=int, default=2, help="images in a forward, not of a layer")
    add("--size", type=int, default=224, help="side of an image in pixels, not of a layer")
    add("--accumulation", type=int, default=8, help="accumulation: micro-batches in one step")
    add(
        "--clock",
        choices=CLOCKS,
        help="cpu: CPU time of all threads, for a machine that others use (default: wall, cuda)",
    )
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    whole = {"detector": DETECTORS, "accumulation": STEPS}
    args.norms = args.norms or ",".join(whole.get(args.what, ("bn", "mabn")))
    args.clock = args.clock or {"cpu": "wall", "cuda": "cuda"}[args.device]
    try:
        args.norms = choose_norms(
            args.norms, known_norms(args.what), args.device, args.what, args.baseline
        )
        if (args.device == "cuda") != (args.clock == "cuda"):
            raise ValueError("--clock cuda goes with --device cuda, wall and cpu with cpu")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch sees no CUDA device")
        if args.rounds < 2:
            raise ValueError("quartiles need two rounds")
        for name in ("threads", "depth", "batch", "size", "accumulation"):
            value = getattr(args, name)
            if min(value if isinstance(value, list) else [value]) < 1:
                raise ValueError(f"--{name} {value}: use numbers above 0")
        if not 0 <= args.round_seconds < math.inf:
            raise ValueError(f"--round-seconds {args.round_seconds}: use a number 0 or more")
        if args.output:
            _check_output(args.output)
    except ValueError as error:
        parser.error(str(error))
    return args


def _check_output(path: Path) -> None:
    """Raise ValueError, before hours of measuring, if the report can't be written."""
    if path.is_dir() or path.suffix == ".png":
        raise ValueError(f"--output {path}: name a JSON file; the picture beside it is a PNG file")
    try:
        check_writable(path.parent)
    except OSError as error:
        raise ValueError(f"--output {path} can't be written: {error.strerror}") from error


@one_line_errors(OSError, ValueError)
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line names; an error of the user's is one line."""
    run_benchmark(parse_args(arguments))
