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
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mabn_d2.checkpoint.io import CheckpointError, atomic_file, read_checkpoint
from mabn_d2.checkpoint.state import unwrap
from mabn_d2.data.images import (
    Images,
    ImagesError,
    build_train_loader,
    build_val_loader,
    check_classes,
    train_transform,
    val_transform,
)
from mabn_d2.modeling.classifier import ARCHS, NORMS, build_classifier

# Levels of 0-255, as (mean, std) of RGB.
TORCHVISION = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="with train/<class>/* and val/<class>/*")
    add("--output", default="output/imagenet", metavar="DIR", help="checkpoint.pth, logs")
    add("--arch", default="resnet50", choices=(*ARCHS, "small"))
    add("--norm", default="mabn", choices=NORMS)
    add("--norm-batch", type=int, default=2, help="images in one normalization batch")
    add("--simulated-batch", type=int, default=32, help="images that MABN's windows span")
    add("--norm-option", action="append", default=[], metavar="NAME=VALUE",
        help="argument of MABN2d or BatchRenorm2d; may be repeated")
    add("--batch-size", type=int, default=32, help="images of one GPU in one iteration")
    add("--epochs", type=int, default=120)
    add("--epoch-iters", type=int, default=5000,
        help="iterations of an epoch; 0: as many as the images fill")
    add("--lr", type=float, default=0.1, help="of 256 images an iteration in the paper")
    add("--schedule", default="step", choices=("step", "cosine"))
    add("--steps", type=int, nargs="*", default=[30, 60, 90], help="epochs, each 0.1 times the rate")
    add("--warmup-epochs", type=float, default=0.0, help="the rate grows linearly at first")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=1e-4)
    add("--label-smoothing", type=float, default=0.1)
    add("--crop", type=int, default=224, help="pixels, of training and test images")
    add("--val-resize", type=int, default=256, help="shorter side before the centre crop")
    add("--no-augment", action="store_true", help="training images resized only")
    add("--bgr255", action="store_true",
        help="input as published: BGR levels of 0-255 as they are; otherwise torchvision's")
    add("--amp", action="store_true", help="forward in bfloat16")
    add("--channels-last", action="store_true")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=8, help="loader processes of one GPU")
    add("--seed", type=int, default=0)
    add("--strict", action="store_true",
        help="an image that can't be read is an error; otherwise skipped, counted, named")
    add("--resume", default="no", choices=("no", "auto"), help="auto: from --output, if there")
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


def to_input(images, args, device):
    """(N, 3, H, W) uint8 RGB -> what the network takes, on the device."""
    images = images.to(device, non_blocking=True).float()
    if args.bgr255:
        images = images.flip(1)
    else:
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in TORCHVISION)
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
    """Return {"top1", "top5"} errors in %, images, and bad paths; exact over all ranks."""
    model.eval()
    right1, right5, count, bad = 0, 0, 0, []
    hidden = dist.is_initialized() and dist.get_rank() > 0
    for images, labels, bad_paths in tqdm(loader, "test", leave=False, disable=hidden or None):
        bad += bad_paths
        if not len(labels):
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            scores = model(to_input(images, args, device))
        best = scores.topk(min(5, scores.shape[1]), 1).indices == labels.to(device)[:, None]
        right1, right5 = right1 + best[:, 0].sum(), right5 + best.sum()
        count += len(labels)
    right1, right5, count, num_bad = reduce_sum([right1, right5, count, len(bad)], device)
    model.train()
    if not count:
        raise ImagesError("no image of val/ can be read")
    errors = {"top1_error": 100 * (1 - right1 / count), "top5_error": 100 * (1 - right5 / count)}
    return {**errors, "images": int(count), "bad_images": int(num_bad)}, bad


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


def main(args):
    """Train, or test only; return the last test's result."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.benchmark = True
    if args.norm == "syncbn" and (device.type != "cuda" or world_size == 1):
        raise ValueError("--norm syncbn needs several GPUs: use torchrun, or --norm bn")
    own_group = world_size > 1 and not dist.is_initialized()
    if own_group:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        return run(args, device, world_size, rank)
    finally:
        if own_group:
            dist.destroy_process_group()


def run(args, device, world_size, rank):
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
        args.arch, args.norm, args.norm_batch, args.simulated_batch, len(val.classes),
        **norm_settings(args.norm_option),
    ).to(device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint, args)
    if args.test_only:
        result, bad_paths = evaluate(model, val_loader, args, device)
        if rank == 0:
            print(json.dumps({"checkpoint": args.checkpoint, **result}))
        return result

    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay
    )
    output = Path(args.output)
    latest = output / "checkpoint.pth"
    start, result = 0, None
    if args.resume == "auto" and latest.exists():
        checkpoint = load_checkpoint(model, latest, args)
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, result = checkpoint["iteration"], checkpoint["result"]
    parallel = model
    if world_size > 1:
        ids = [device.index or torch.cuda.current_device()] if device.type == "cuda" else None
        parallel = torch.nn.parallel.DistributedDataParallel(model, ids, broadcast_buffers=False)

    epoch_iters = args.epoch_iters or math.ceil(len(train) / (args.batch_size * world_size))
    total = args.epochs * epoch_iters
    batches = iter(
        build_train_loader(
            train, args.batch_size, args.seed, start, args.workers, rank, world_size
        )
    )
    writer = None
    if rank == 0:
        output.mkdir(parents=True, exist_ok=True)
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
    loss_sum, waited, images_seen, num_bad = torch.zeros((), device=device), 0.0, 0, 0
    began = time.perf_counter()
    for iteration in range(start, total):
        done = iteration + 1
        before = time.perf_counter()
        images, labels, bad_paths = next(batches)
        waited += time.perf_counter() - before
        if bad_paths:
            num_bad += len(bad_paths)
            bar.write(f"skipped, can't be read ({num_bad} so far): {', '.join(bad_paths)}", sys.stderr)
            log(skipped=num_bad, skipped_paths=bad_paths)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, iteration, epoch_iters)
        inputs, labels = to_input(images, args, device), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            scores = parallel(inputs)
        loss = F.cross_entropy(scores.float(), labels, label_smoothing=args.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach()
        images_seen += len(labels)
        bar.update()

        ends_epoch = done % epoch_iters == 0
        saves = done % (args.checkpoint_period or epoch_iters) == 0 or done == total
        if done % args.log_period == 0 or ends_epoch or saves:
            # The one synchronization with the device; all ranks see the same sum.
            (total_loss,) = reduce_sum([loss_sum.item()], device)
            seconds = time.perf_counter() - began
            count = (images_seen / args.batch_size) * world_size
            if not math.isfinite(total_loss):
                raise FloatingPointError(
                    f"the loss is {total_loss} after iteration {done}: lower --lr or add "
                    f"--warmup-epochs, and go on from {latest} with --resume auto"
                )
            mean_loss = total_loss / count
            log(
                loss=mean_loss,
                lr=optimizer.param_groups[0]["lr"],
                images_per_second=images_seen * world_size / seconds,
                loader_wait=waited / seconds,
            )
            bar.set_postfix(loss=f"{mean_loss:.3f}", wait=f"{waited / seconds:.0%}")
            loss_sum.zero_()
            waited, images_seen = 0.0, 0
            began = time.perf_counter()
        if ends_epoch or saves:
            average_statistics(model)
        if ends_epoch or done == total:
            result, bad_paths = evaluate(model, val_loader, args, device)
            log(epoch=done / epoch_iters, **result)
            result["train_loss"] = mean_loss  # since the last log entry
            if bad_paths:
                bar.write(f"not tested, can't be read: {', '.join(bad_paths)}", sys.stderr)
            bar.write(f"epoch {done / epoch_iters:.0f}: " + json.dumps(result), sys.stderr)
            began = time.perf_counter()
        if saves and rank == 0:
            with atomic_file(latest) as file:
                torch.save({
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "iteration": done,
                    "arch": args.arch,
                    "norm": args.norm,
                    "result": result,
                    "args": vars(args),
                }, file)
    bar.close()
    if writer:
        writer.close()
    return result


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ImagesError, CheckpointError, FloatingPointError, ValueError, TypeError) as error:
        sys.exit(f"train_imagenet.py: {error}")
