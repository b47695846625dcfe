"""Training and testing of a classifier."""

import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm

from ..checkpoint.io import read_checkpoint
from ..engine.guarded_trainer import MAX_REJECTED
from ..engine.hooks import StopOnSignal
from ..engine.launch import check_launch, started_process
from ..modeling.norm_table import parse_norm_options
from .evaluation import evaluate
from .image_folder import (
    Images,
    build_train_loader,
    build_val_loader,
    check_classes,
    train_transform,
    val_transform,
)
from .meter import Meter
from .models import build_classifier
from .network_input import to_input
from .processes import Processes, average_statistics, process_group
from .run_folder import (
    CHECKPOINT,
    Log,
    check_class_names,
    check_output,
    check_resume,
    load_checkpoint,
    save_checkpoint,
)
from .schedule import learning_rate


def train_classifier(args: Namespace) -> dict:
    """Train, or test only; return the result of the last test.

    Args:
        args: what `arguments.parse_args` returns.

    Raises:
        ValueError: for wrong arguments, data or checkpoints, before anything is trained.
        FloatingPointError: if too many batches in a row have gradients that are not finite.
        SystemExit: 128 + signal, after SIGTERM or SIGINT and a checkpoint.
    """
    device, started = torch.device(args.device), started_process()
    check_launch(int(device.type == "cuda"))
    processes = Processes.of(started)
    if not args.test_only:
        check_output(args)
    if device.type == "cuda":
        torch.cuda.set_device(started.local_rank if started else 0)
        torch.backends.cudnn.benchmark = True
    if args.norm == "syncbn" and device.type == "cpu" and processes.world_size > 1:
        raise ValueError(
            "--norm syncbn over several processes needs GPUs, torch has none for the CPU: use one "
            "process, or --norm bn"
        )
    stop = StopOnSignal(None)
    with process_group(device, started):
        try:
            if args.test_only:
                return test_only(args, processes, device)
            stop.before_train()
            # Both splits are checked before anything is built.
            train, val = build_train_data(args), build_val_data(args)
            check_classes(train, val)
            say_what_is_left_out(processes, train, val)
            model = build_model(args, len(val.classes), device)
            return Training(args, processes, device, model, train, val, stop).run()
        finally:
            stop.after_train()


def test_only(args: Namespace, processes: Processes, device: torch.device) -> dict:
    """Test the weights of --checkpoint; print and return the result."""
    val = build_val_data(args)
    say_what_is_left_out(processes, val)
    model = build_model(args, len(val.classes), device)
    check_class_names(read_checkpoint(args.checkpoint), args.checkpoint, val.classes)
    loader = build_val_loader(val, args.batch_size, args.workers, *processes)
    result = evaluate(model, loader, args, device)
    if processes.rank == 0:
        print(json.dumps({"checkpoint": args.checkpoint, **result}))
    return result


def build_train_data(args: Namespace) -> Images:
    """Return the training images."""
    transform = train_transform(args.crop, not args.no_augment)
    return Images(Path(args.data) / "train", transform, "error" if args.strict else "next")


def build_val_data(args: Namespace) -> Images:
    """Return the test images."""
    transform = val_transform(args.crop, args.val_resize)
    return Images(Path(args.data) / "val", transform, "error" if args.strict else "drop")


def say_what_is_left_out(processes: Processes, *parts: Images) -> None:
    """Name files that are no images by their ending on stderr, once for all processes."""
    for images in parts:
        if images.others and processes.rank == 0:
            print(images.said_of_others(), file=sys.stderr)


def build_model(args: Namespace, num_classes: int, device: torch.device) -> nn.Module:
    """Return the classifier; the same initial weights on all ranks."""
    torch.manual_seed(args.seed)
    options = parse_norm_options(args.norm_option)
    sizes = args.norm_batch, args.simulated_batch, num_classes
    model = build_classifier(args.arch, args.norm, *sizes, **options).to(device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint, args)
    return model


def build_optimizer(args: Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD that skips a step on the device where `found_inf` is 1; the host does not wait."""
    params = list(model.parameters())
    optimizer = torch.optim.SGD(
        params, args.lr, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    for param in params:  # otherwise undefined if the first step is skipped
        optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    return optimizer


class Training:
    """One run, from its first iteration or the last checkpoint to its end.

    Args:
        args: arguments of the command line.
        processes: rank and number of processes.
        device: of the model.
        model: with its initial weights.
        train: training images.
        val: test images.
        stop: knows the signal that was received.
    """

    def __init__(
        self,
        args: Namespace,
        processes: Processes,
        device: torch.device,
        model: nn.Module,
        train: Images,
        val: Images,
        stop: StopOnSignal,
    ):
        self.args, self.processes, self.device, self.model = args, processes, device, model
        self.val_loader = build_val_loader(val, args.batch_size, args.workers, *processes)
        self.stop, self.classes = stop, train.classes
        numbers = {"processes": processes.world_size, "train_images": len(train)}
        self.settings = {**vars(args), **numbers}
        self.folder = Path(args.output)
        self.optimizer = build_optimizer(args, model)
        self.params = list(model.parameters())
        self.start, self.result = self.resume()
        self.parallel = self.distribute()
        images = args.batch_size * processes.world_size
        self.epoch_iters = args.epoch_iters or math.ceil(len(train) / images)
        self.total = args.epochs * self.epoch_iters
        self.meter = Meter(device, images, processes.world_size, args.workers)
        self.batches = build_train_loader(
            train, args.batch_size, args.seed, self.start, args.workers, *processes
        )
        self.log = Log(self.folder, processes.rank)

    def resume(self) -> tuple[int, dict | None]:
        """Load the run in the output folder if there is one; return its iteration and result."""
        path = self.folder / CHECKPOINT
        if self.args.resume != "auto" or not path.exists():
            return 0, None
        checkpoint = load_checkpoint(self.model, path, self.args)
        check_resume(checkpoint, path, self.settings)
        check_class_names(checkpoint, path, self.classes)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        return checkpoint["iteration"], checkpoint["result"]

    def distribute(self) -> nn.Module:
        """Return the model, wrapped if several processes train it."""
        if self.processes.world_size == 1:
            return self.model
        cuda = self.device.type == "cuda"
        ids = [self.device.index or torch.cuda.current_device()] if cuda else None
        return nn.parallel.DistributedDataParallel(self.model, ids, broadcast_buffers=False)

    def run(self) -> dict:
        """Train to the end; return the result of the last test."""
        self.model.train()
        hidden = True if self.processes.rank else None
        batches = iter(self.batches)
        with tqdm(total=self.total, initial=self.start, disable=hidden) as bar:
            self.meter.restart_clock()
            for iteration in range(self.start, self.total):
                images, labels = self.load(batches, bar)
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(self.args, iteration, self.epoch_iters)
                self.meter.add_step(*self.step(images, labels))
                bar.update()
                self.after_step(iteration + 1, bar)
        self.log.close()
        assert self.result is not None  # the last iteration is tested
        return self.result

    def load(self, batches: Iterator[Any], bar: tqdm) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and labels of the next batch."""
        before = time.perf_counter()
        images, labels, bad_paths, loaded = next(batches)
        self.meter.add_batch(time.perf_counter() - before, loaded, bad_paths)
        if bad_paths:
            bar.write(f"skipped, can't be read: {', '.join(bad_paths)}", sys.stderr)
        return images, labels

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Train on one batch; return the loss and whether the step was rejected, on the device.

        If a gradient is not finite, no parameter changes; all ranks decide alike.
        """
        inputs = to_input(images, self.args, self.device)
        labels = labels.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
            scores = self.parallel(inputs)
        loss = F.cross_entropy(scores.float(), labels, label_smoothing=self.args.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        gradients = [param.grad for param in self.params if param.grad is not None]
        reject = ~torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        self.optimizer.found_inf = reject.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        return loss.detach(), reject

    def after_step(self, done: int, bar: tqdm) -> None:
        """Log, test, save and stop when it is time to; `done` iterations are done."""
        received = max(comm.all_gather(self.stop.received))  # all ranks stop in one iteration
        ends_epoch = done % self.epoch_iters == 0
        period = self.args.checkpoint_period or self.epoch_iters
        saves = done % period == 0 or done == self.total or received
        if done % self.args.log_period == 0 or ends_epoch or saves:
            self.write_log(done, bar)
        if ends_epoch or saves:
            average_statistics(self.model)
        if ends_epoch or done == self.total:
            self.test(done, bar)
        if saves and self.processes.rank == 0:
            state = self.model, self.optimizer, done, self.result, self.settings, self.classes
            save_checkpoint(self.folder, *state)
        if received:
            comm.synchronize()  # no rank may leave before the checkpoint is whole
            bar.write(f"stopped after iteration {done}: go on with --resume auto", sys.stderr)
            raise SystemExit(128 + received)

    def write_log(self, done: int, bar: tqdm) -> None:
        """Write what happened since the last entry; end the run if every batch is rejected."""
        entry, in_a_row = self.meter.read()
        self.log.write(done, {**entry, "lr": self.optimizer.param_groups[0]["lr"]})
        if in_a_row >= MAX_REJECTED:
            raise FloatingPointError(
                f"{in_a_row} batches in a row up to iteration {done} have gradients that are "
                "not finite: lower --lr or add --warmup-epochs, with another --output"
            )
        self.loss = entry["loss"]
        bar.set_postfix(loss=f"{self.loss:.3f}", wait=f"{entry['loader_wait']:.0%}")
        self.meter.reset()

    def test(self, done: int, bar: tqdm) -> None:
        """Test, and write the result."""
        self.result = evaluate(self.model, self.val_loader, self.args, self.device)
        epoch = done / self.epoch_iters
        self.log.write(done, {"epoch": epoch, **self.result})
        self.result["train_loss"] = self.loss  # since the log entry before
        if self.processes.rank == 0:
            bar.write(f"epoch {epoch:.0f}: {json.dumps(self.result)}", sys.stderr)
        self.meter.restart_clock()
