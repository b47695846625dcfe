#!/usr/bin/env python
"""Trains and tests classifiers on an image folder, with normalization batches of any size.

One process: tools/train_imagenet.py --data DIR. Eight GPUs: torchrun --nproc_per_node 8 and the same.
"""

import argparse
import ast
import json
import math
import os
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.utils import comm
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mabn_d2.checkpoint.io import CheckpointError, atomic_file, read_checkpoint
from mabn_d2.checkpoint.state import unwrap
from mabn_d2.classification.image_folder import (
    Images,
    ImagesError,
    build_train_loader,
    build_val_loader,
    check_classes,
    train_transform,
    val_transform,
)
from mabn_d2.classification.models import ARCHS, build_classifier, norm_names
from mabn_d2.engine.guarded_trainer import MAX_REJECTED
from mabn_d2.engine.hooks import StopOnSignal

# Levels of 0-255, as (mean, std) of RGB.
TORCHVISION = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])

# What a run may go on with otherwise than it began; anything else would make it another run.
MAY_CHANGE = {
    "data",
    "output",
    "checkpoint",
    "device",
    "workers",
    "strict",
    "resume",
    "test_only",
    "log_period",
    "checkpoint_period",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
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
    add("--lr", type=float, default=0.1, help="of 256 images an iteration in the paper")
    add("--schedule", default="step", choices=("step", "cosine"))
    add(
        "--steps", type=int, nargs="*", default=[30, 60, 90], help="epochs, each 0.1 times the rate"
    )
    add("--warmup-epochs", type=float, default=0.0, help="the rate grows linearly at first")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=1e-4)
    add("--label-smoothing", type=float, default=0.1)
    add("--crop", type=int, default=224, help="pixels, of training and test images")
    add("--val-resize", type=int, default=256, help="shorter side before the centre crop")
    add("--no-augment", action="store_true", help="training images resized only")
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
        help="an image that can't be read is an error; otherwise skipped, counted, named",
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
    args = parser.parse_args(argv)
    for name in ("batch_size", "epochs", "crop", "val_resize", "log_period"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if args.test_only and not args.checkpoint:
        parser.error("--test-only needs --checkpoint FILE")
    return args


def norm_settings(options):
    try:
        return {name: ast.literal_eval(value) for name, value in (o.split("=") for o in options)}
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"--norm-option takes NAME=VALUE, a number, got {options}") from error


def learning_rate(args, iteration, epoch_iters):
    """The rate of an iteration, counted from 0: no state, so that resuming needs none."""
    warmup, total = args.warmup_epochs * epoch_iters, args.epochs * epoch_iters
    if iteration < warmup:
        return args.lr * (iteration + 1) / warmup
    if args.schedule == "cosine":
        return args.lr / 2 * (1 + math.cos(math.pi * (iteration - warmup) / (total - warmup)))
    return args.lr * 0.1 ** sum(iteration >= step * epoch_iters for step in args.steps)


@lru_cache
def torchvision_levels(device):
    """TORCHVISION on the device, once: a copy in every iteration would wait for the device."""
    return [torch.tensor(values, device=device)[:, None, None] for values in TORCHVISION]


def to_input(images, args, device):
    """(N, 3, H, W) uint8 RGB -> what the network takes, on the device."""
    images = images.to(device, non_blocking=True).float()
    if args.bgr255:
        images = images.flip(1)
    else:
        mean, std = torchvision_levels(device)
        images = (images - mean) / std
    return images.contiguous(memory_format=torch.channels_last) if args.channels_last else images


def reduce_sum(values, device):
    """Sum a list of numbers over all ranks."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def average_statistics(model):
    """Average running_mean and running_var over the ranks, which train with their own."""
    if dist.is_initialized():
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()


@torch.inference_mode()
def evaluate(model, loader, args, device):
    """Return top-1 and top-5 errors in %, images, and paths of bad ones; exact over all ranks."""
    model.eval()
    right1, right5, count, bad = 0, 0, 0, []
    hidden = dist.is_initialized() and dist.get_rank() > 0
    for images, labels, bad_paths, _ in tqdm(loader, "test", leave=False, disable=hidden or None):
        bad += bad_paths
        if not len(labels):
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            scores = model(to_input(images, args, device))
        best = scores.topk(min(5, scores.shape[1]), 1).indices == labels.to(device)[:, None]
        right1, right5 = right1 + best[:, 0].sum(), right5 + best.sum()
        count += len(labels)
    right1, right5, count = reduce_sum([right1, right5, count], device)
    bad = sum(comm.all_gather(bad), [])
    model.train()
    if not count:
        raise ImagesError("no image of val/ can be read")
    errors = {"top1_error": 100 * (1 - right1 / count), "top5_error": 100 * (1 - right5 / count)}
    return {**errors, "images": int(count), "bad_images": len(bad), "bad_paths": bad}


def load_checkpoint(model, path, args):
    """Load a file of this script, or any state dict of the same network; return all it holds."""
    checkpoint = read_checkpoint(path)
    state, _ = unwrap(checkpoint)
    for key in ("arch", "norm"):
        saved = checkpoint.get(key)
        if isinstance(saved, str) and saved != getattr(args, key):
            raise CheckpointError(f"{path} is of --{key} {saved}, not {getattr(args, key)}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise CheckpointError(
            f"{path} does not fit --arch {args.arch} --norm {args.norm} and the classes of --data: "
            + " ".join(line.strip() for line in lines[1:4])[:400]
        ) from error
    return checkpoint


def check_output(args):
    """Raise ValueError, before data is read, if --output can't be written to or holds a run."""
    folder = Path(args.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output {folder} can't be written to: {error.strerror}") from error
    if args.resume == "no" and (folder / "checkpoint.pth").exists():
        raise ValueError(
            f"--output {folder} holds a run: add --resume auto to go on with it, or name another"
        )


def check_resume(checkpoint, path, settings):
    """Raise CheckpointError unless the checkpoint is of a run with the same settings."""
    if missing := {"optimizer", "iteration", "result", "args"} - checkpoint.keys():
        raise CheckpointError(
            f"{path} is no run to go on with, it lacks {', '.join(sorted(missing))}: start from its "
            "weights by --checkpoint, with another --output"
        )
    saved = checkpoint["args"]
    other = [
        f"--{name.replace('_', '-')} {saved[name]}, not {value}"
        for name, value in settings.items()
        if name not in MAY_CHANGE and name in saved and saved[name] != value
    ]
    if other:
        raise CheckpointError(
            f"{path} is of a run with {'; '.join(other)}: go on with its settings, or name another "
            "--output"
        )


def main(args):
    """Train, or test only; return the last test's result.

    Raises:
        SystemExit: 128 + signal, after SIGTERM or SIGINT and a checkpoint.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device(args.device)
    if not args.test_only:
        check_output(args)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.benchmark = True
    if args.norm == "syncbn" and device.type == "cpu" and world_size > 1:
        raise ValueError(
            "--norm syncbn over several processes needs GPUs, torch has none for the CPU: use one "
            "process, or --norm bn"
        )
    own_group = world_size > 1 and not dist.is_initialized()
    if own_group:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    stop = StopOnSignal(None)
    try:
        if not args.test_only:
            stop.before_train()
        return run(args, device, world_size, rank, stop)
    finally:
        stop.after_train()
        if own_group:
            dist.destroy_process_group()


def run(args, device, world_size, rank, stop):
    settings = {**vars(args), "processes": world_size}

    # Data: both splits are checked before anything is built.
    bad = ("error", "error") if args.strict else ("next", "drop")
    folder = Path(args.data)
    val = Images(folder / "val", val_transform(args.crop, args.val_resize), bad[1])
    val_loader = build_val_loader(val, args.batch_size, args.workers, rank, world_size)
    if not args.test_only:
        train = Images(folder / "train", train_transform(args.crop, not args.no_augment), bad[0])
        check_classes(train, val)

    # Model: the same initial weights on all ranks.
    torch.manual_seed(args.seed)
    model = build_classifier(
        args.arch,
        args.norm,
        args.norm_batch,
        args.simulated_batch,
        len(val.classes),
        **norm_settings(args.norm_option),
    ).to(device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint, args)
    if args.test_only:
        result = evaluate(model, val_loader, args, device)
        if rank == 0:
            print(json.dumps({"checkpoint": args.checkpoint, **result}))
        return result

    params = list(model.parameters())
    # The fused SGD leaves out a step on the device, where `found_inf` is: nobody waits for it.
    optimizer = torch.optim.SGD(
        params, args.lr, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    for param in params:  # undefined after a first step that was left out
        optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    output = Path(args.output)
    latest = output / "checkpoint.pth"
    start, result = 0, None
    if args.resume == "auto" and latest.exists():
        checkpoint = load_checkpoint(model, latest, args)
        check_resume(checkpoint, latest, settings)
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, result = checkpoint["iteration"], checkpoint["result"]
    parallel = model
    if world_size > 1:
        ids = [device.index or torch.cuda.current_device()] if device.type == "cuda" else None
        parallel = torch.nn.parallel.DistributedDataParallel(model, ids, broadcast_buffers=False)

    epoch_iters = args.epoch_iters or math.ceil(len(train) / (args.batch_size * world_size))
    total = args.epochs * epoch_iters
    batches = iter(
        build_train_loader(train, args.batch_size, args.seed, start, args.workers, rank, world_size)
    )
    writer = None
    if rank == 0:
        for partial in output.glob(f".{latest.name}.*.partial"):  # of a run that was killed
            partial.unlink()
        writer = SummaryWriter(output)

    def log(**values):
        """Write numbers to log.json, one object a line, and to TensorBoard."""
        if rank == 0:
            with open(output / "log.json", "a") as file:
                file.write(json.dumps({"iteration": done, **values}) + "\n")
            for name, value in values.items():
                if not isinstance(value, list):
                    writer.add_scalar(name, value, done)

    model.train()
    bar = tqdm(total=total, initial=start, disable=True if rank else None)
    # On the device, since the last log entry: sum of losses, rejected batches; those in a row.
    loss_sum, rejected, in_a_row = torch.zeros(3, device=device)
    waited, loaded, iterations, bad = 0.0, 0.0, 0, []
    began = time.perf_counter()
    for iteration in range(start, total):
        done = iteration + 1
        before = time.perf_counter()
        images, labels, bad_paths, seconds = next(batches)
        waited, loaded = waited + time.perf_counter() - before, loaded + seconds
        if bad_paths:
            bad += bad_paths
            bar.write(f"skipped, can't be read: {', '.join(bad_paths)}", sys.stderr)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, iteration, epoch_iters)
        inputs, labels = to_input(images, args, device), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            scores = parallel(inputs)
        loss = F.cross_entropy(scores.float(), labels, label_smoothing=args.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        # A batch with gradients that are not finite, the same on all ranks, moves no parameter.
        reject = ~torch.stack(torch._foreach_norm([p.grad for p in params])).isfinite().all()
        optimizer.found_inf = reject.float()
        optimizer.step()
        loss_sum += torch.where(reject, 0, loss.detach())
        rejected += reject
        in_a_row = (in_a_row + 1) * reject
        iterations += 1
        bar.update()

        received = max(comm.all_gather(stop.received))  # all ranks stop in the same iteration
        ends_epoch = done % epoch_iters == 0
        saves = done % (args.checkpoint_period or epoch_iters) == 0 or done == total or received
        if done % args.log_period == 0 or ends_epoch or saves:
            # The one synchronization with the device.
            sums = torch.stack([loss_sum, rejected, in_a_row]).tolist()
            total_loss, total_loaded = reduce_sum([sums[0], loaded], device)
            seconds = time.perf_counter() - began
            count = iterations * args.batch_size * world_size
            learned = (iterations - sums[1]) * world_size
            mean_loss = total_loss / learned if learned else math.nan
            bad = sum(comm.all_gather(bad), [])
            log(
                loss=mean_loss,
                lr=optimizer.param_groups[0]["lr"],
                images_per_second=count / seconds,
                # What the loader processes deliver when nobody lets them wait.
                loader_images_per_second=count * world_size * max(args.workers, 1) / total_loaded,
                loader_wait=waited / seconds,
                rejected_batches=int(sums[1]),
                bad_images=len(bad),
                bad_paths=bad,
            )
            if sums[2] >= MAX_REJECTED:
                raise FloatingPointError(
                    f"{sums[2]:.0f} batches in a row up to iteration {done} have gradients that are "
                    "not finite: lower --lr or add --warmup-epochs, with another --output"
                )
            bar.set_postfix(loss=f"{mean_loss:.3f}", wait=f"{waited / seconds:.0%}")
            loss_sum.zero_()
            rejected.zero_()
            waited, loaded, iterations, bad = 0.0, 0.0, 0, []
            began = time.perf_counter()
        if ends_epoch or saves:
            average_statistics(model)
        if ends_epoch or done == total:
            result = evaluate(model, val_loader, args, device)
            log(epoch=done / epoch_iters, **result)
            result["train_loss"] = mean_loss  # since the last log entry
            if rank == 0:
                bar.write(f"epoch {done / epoch_iters:.0f}: {json.dumps(result)}", sys.stderr)
            began = time.perf_counter()
        if saves and rank == 0:
            with atomic_file(latest) as file:
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "iteration": done,
                        "arch": args.arch,
                        "norm": args.norm,
                        "result": result,
                        "args": settings,
                    },
                    file,
                )
        if received:
            comm.synchronize()  # no rank may leave before the checkpoint is whole
            bar.write(f"stopped after iteration {done}: go on with --resume auto", sys.stderr)
            raise SystemExit(128 + received)
    bar.close()
    if writer:
        writer.close()
    return result


if __name__ == "__main__":
    try:
        main(parse_args())
    except (FloatingPointError, OSError, TypeError, ValueError) as error:
        sys.exit(f"train_imagenet.py: {error}")
