"""tools/train_imagenet.py: what interrupts a run, and how it goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from classifying import ENVIRONMENT, RANKS, arguments, damage, load, make_data, read_log, train
from mabn_d2.classification import training
from mabn_d2.classification.models import build_classifier
from paths import ROOT


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_writes_a_checkpoint_and_the_run_goes_on_exactly(
    data, tmp_path, monkeypatch, number
):
    more = ("--norm-option", "warmup_iters=2")
    train(data, tmp_path / "a", *more)
    (tmp_path / "b").mkdir()
    partial = tmp_path / "b/.checkpoint.pth.1.partial"
    partial.touch()
    rate, before = training.learning_rate, signal.getsignal(number)

    def interrupt(args, iteration, epoch_iters):
        if iteration == 3:
            os.kill(os.getpid(), number)
        return rate(args, iteration, epoch_iters)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(training, "learning_rate", interrupt)
        train(data, tmp_path / "b", *more)
    assert stop.value.code == 128 + number and signal.getsignal(number) is before
    assert load(tmp_path / "b")["iteration"] == 4 and not partial.exists()
    result = train(data, tmp_path / "b", *more, "--resume", "auto")
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    assert (
        a["iteration"] == b["iteration"] == 6 and result["top1_error"] == a["result"]["top1_error"]
    )
    assert a["model"]["1.iters"] == 6 and "1.pre_x2" in a["model"]
    for key, value in a["model"].items():
        assert torch.equal(value, b["model"][key]), key
    momentum = [x["optimizer"]["state"][0]["momentum_buffer"] for x in (a, b)]
    assert torch.equal(*momentum)
    for line in read_log(tmp_path / "a", "loss"):
        assert 0 <= line["loader_wait"] <= 1
        # Without loader processes nothing is loaded while the network trains.
        assert line["loader_images_per_second"] > line["images_per_second"] > 0


@pytest.mark.parametrize("launcher, code", [([sys.executable], 128 + signal.SIGTERM), (RANKS, 1)])
def test_signal_to_all_processes_spares_the_loader_processes(data, tmp_path, launcher, code):
    """torchrun hands the signal to each rank's process group."""
    command = [
        *launcher,
        "tools/train_imagenet.py",
        *arguments(data, tmp_path, "--workers", 1, "--epoch-iters", 100000, "--log-period", 1),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while not (tmp_path / "log.json").exists() and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, text = process.communicate(timeout=60)
    assert process.returncode == code and "DataLoader" not in text, text[-2000:]
    assert text.count("go on with --resume auto") == (2 if launcher is RANKS else 1)
    assert load(tmp_path)["iteration"] == read_log(tmp_path, "loss")[-1]["iteration"]


@pytest.mark.parametrize("bad", [0, 2])
def test_batch_of_nan_moves_nothing(data, tmp_path, monkeypatch, bad):
    """The rejected iteration is the first one, or the last of three; training goes on."""
    to_input, calls = training.to_input, iter(range(100))

    def poisoned(images, args, device):
        inputs = to_input(images, args, device)
        return inputs * torch.nan if next(calls) == bad else inputs

    once = ("--epochs", 1)
    train(data, tmp_path / "two", *once, "--epoch-iters", 2, "--weight-decay", 0.01)
    monkeypatch.setattr(training, "to_input", poisoned)
    train(data, tmp_path / "bad", *once, "--weight-decay", 0.01)
    (line,) = read_log(tmp_path / "bad", "loss")
    assert line["rejected_batches"] == 1 and 2 < line["loss"] < 3
    found, two = load(tmp_path / "bad"), load(tmp_path / "two")
    assert all(value.isfinite().all() for value in found["model"].values())
    if bad == 2:
        names = [
            name for name, _ in build_classifier("small", "mabn", 2, 32, 10).named_parameters()
        ]
        assert all(torch.equal(found["model"][name], two["model"][name]) for name in names)
        for x, y in zip(found["optimizer"]["state"].values(), two["optimizer"]["state"].values()):
            assert torch.equal(x["momentum_buffer"], y["momentum_buffer"])


def test_strict_error_of_a_loader_process_is_one_line(tmp_path):
    data = make_data(tmp_path)
    bad = damage(data / "train")
    command = [
        sys.executable,
        "tools/train_imagenet.py",
        *arguments(data, tmp_path / "out", "--workers", 1, "--strict", "--epoch-iters", 10),
    ]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "can't be read" in line]
    assert len(lines) == 1 and lines[0].startswith(f"train_imagenet.py: {bad} can't be read (")
