"""tools/train_imagenet.py: exact resume, exact tests, clear errors."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from mabn_d2.data.digit_crops import CropParams, make_digit_crops
from mabn_d2.modeling.classifier import NORMS, build_classifier

sys.path.insert(0, str(ROOT / "tools"))
import train_imagenet  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_digit_crops(tmp_path_factory.mktemp("data") / "crops",
                            CropParams(num_train=64, num_val=49))


def arguments(data, output, *more):
    return [str(a) for a in (
        "--data", data, "--output", output, "--arch", "small", "--crop", 32, "--val-resize", 32,
        "--batch-size", 8, "--epochs", 2, "--epoch-iters", 3, "--workers", 0, "--device", "cpu",
        "--lr", 0.02, "--norm-option", "warmup_iters=2", *more,
    )]


def train(data, output, *more):
    return train_imagenet.main(train_imagenet.parse_args(arguments(data, output, *more)))


def load(output):
    return torch.load(output / "checkpoint.pth", weights_only=True)


def test_resumed_run_equals_the_straight_one(data, tmp_path):
    train(data, tmp_path / "a")
    train(data, tmp_path / "b", "--epochs", 1)
    assert load(tmp_path / "b")["iteration"] == 3
    result = train(data, tmp_path / "b", "--resume", "auto")
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    assert a["iteration"] == b["iteration"] == 6 and a["result"] == b["result"] == result
    assert a["model"]["1.iters"] == 6 and "1.pre_x2" in a["model"]
    for key, value in a["model"].items():
        assert torch.equal(value, b["model"][key]), key
    log = [json.loads(line) for line in (tmp_path / "a/log.json").read_text().splitlines()]
    assert [line["epoch"] for line in log if "epoch" in line] == [1, 2]
    assert all(0 <= line["loader_wait"] <= 1 for line in log if "loss" in line)


def test_tested_errors_are_exact(data, tmp_path, capsys):
    """The errors of a test in batches, one image left out as unreadable, counted here one by one."""
    train(data, tmp_path, "--epochs", 1, "--bgr255")
    test = ("--test-only", "--checkpoint", tmp_path / "checkpoint.pth", "--bgr255")
    result = train(data, tmp_path, *test)
    model = build_classifier("small", "mabn", 2, 32, 10)
    model.load_state_dict(load(tmp_path)["model"])
    val = train_imagenet.Images(data / "val", train_imagenet.val_transform(32, 32), "error")
    ranks = []
    for index in range(len(val)):
        image, label, _ = val[index, 0]
        with torch.no_grad():
            scores = model.eval()(image.flip(0)[None].float())[0]
        ranks.append((scores > scores[label]).sum().item())
    assert result["images"] == 49
    assert result["top1_error"] == pytest.approx(100 * sum(r > 0 for r in ranks) / 49)
    assert result["top5_error"] == pytest.approx(100 * sum(r > 4 for r in ranks) / 49)


def test_two_processes_count_each_image_once(data, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                   "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "tools/train_imagenet.py", *arguments(data, tmp_path, "--epochs", "1")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = load(tmp_path)["result"]
    alone = train(data, tmp_path, "--test-only", "--checkpoint", tmp_path / "checkpoint.pth")
    assert result["images"] == 49 and result["top1_error"] == pytest.approx(alone["top1_error"])


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "syncbn"])
def test_every_norm_trains_in_either_memory_format(data, tmp_path, norm):
    options = train_imagenet.parse_args(arguments(
        data, tmp_path, "--norm", norm, "--amp", "--channels-last", "--epochs", 1,
        "--schedule", "cosine", "--warmup-epochs", 1, "--log-period", 1))
    options.norm_option = []
    assert 0 <= train_imagenet.main(options)["top1_error"] <= 100
    log = [json.loads(line) for line in (tmp_path / "log.json").read_text().splitlines()]
    rates = [line["lr"] for line in log if "lr" in line]
    assert rates == pytest.approx([0.02 / 3, 0.04 / 3, 0.02])


@pytest.mark.parametrize("more, message", [
    (("--norm-batch", 3), "multiple of batch_size"),
    (("--norm-option", "warmup=3"), "has no argument warmup"),
    (("--norm", "syncbn"), "syncbn needs several GPUs"),
    (("--test-only", "--checkpoint", "nothing.pth"), "can't read nothing.pth"),
    (("--lr", 1e9), "lower --lr"),
])
def test_bad_arguments_are_named(data, tmp_path, more, message):
    with pytest.raises((ValueError, TypeError, FloatingPointError), match=message):
        train(data, tmp_path, *more)


def test_checkpoint_of_another_network_is_refused_and_kept(data, tmp_path):
    train(data, tmp_path, "--epochs", 1)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    for more in (("--norm", "gn", "--norm-option"), ("--arch", "resnet18", "--norm-option")):
        with pytest.raises(ValueError, match=f"not {more[1]}"):
            options = train_imagenet.parse_args(arguments(data, tmp_path, *more, "eps=1e-5"))
            options.norm_option, options.resume = [], "auto"
            train_imagenet.main(options)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
