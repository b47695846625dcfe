"""tools/train_imagenet.py: exact tests, all norms, clear errors before data is read."""

import json
import re
import subprocess
import sys

import pytest
import torch

from classifying import ENVIRONMENT, arguments, damage, load, make_data, read_log, train
from commands import free_port, slurm_variables
from mabn_d2.checkpoint.io import CheckpointError
from mabn_d2.classification.arguments import parse_args
from mabn_d2.classification.image_folder import Images, ImagesError, val_transform
from mabn_d2.classification.models import ARCHS, build_classifier, norm_names
from mabn_d2.classification.run_folder import load_checkpoint
from mabn_d2.layers import MABN2d, SplitMABN2d
from paths import ROOT


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def test_tested_errors_are_exact(tmp_path):
    """The errors of a test in batches, one image left out as unreadable, counted here one by one."""
    data = make_data(tmp_path)
    bad = damage(data / "val")
    train(data, tmp_path, "--epochs", 1, "--bgr255")
    test = ("--test-only", "--checkpoint", tmp_path / "checkpoint.pth", "--bgr255")
    result = train(data, tmp_path, *test)
    model = build_classifier("small", "mabn", 2, 32, 10)
    model.load_state_dict(load(tmp_path)["model"])
    val = Images(data / "val", val_transform(32, 32), "drop")
    ranks = []
    for image, label, *_ in (val[index, 0] for index in range(49)):
        if image is not None:
            with torch.no_grad():
                scores = model.eval()(image.flip(0)[None].float())[0]
            ranks.append((scores > scores[label]).sum().item())
    assert result["images"] == len(ranks) == 48 and result["bad_paths"] == [bad]
    assert result["top1_error"] == pytest.approx(100 * sum(r > 0 for r in ranks) / 48)
    assert result["top5_error"] == pytest.approx(100 * sum(r > 4 for r in ranks) / 48)
    (line,) = read_log(tmp_path, "epoch")
    assert line["bad_images"] == 1 and line["bad_paths"] == [bad]
    with pytest.raises(ImagesError, match=f"{bad} can't be read"):
        train(data, tmp_path, *test, "--strict", "--workers", 1)


def test_other_class_folders(tmp_path):
    """Their number is the same, so the weights fit, but the outputs would be of other classes."""
    data = make_data(tmp_path)
    train(data, tmp_path, "--epochs", 1, "--epoch-iters", 1)
    names = load(tmp_path)["classes"]
    assert names == [str(digit) for digit in range(10)]
    for split in ("train", "val"):
        (data / split / "3").rename(data / split / "three")
    test = ("--test-only", "--checkpoint", tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="class 3 is '3' there and '4' here"):
        train(data, tmp_path, *test)
    with pytest.raises(CheckpointError, match="class 3 is '3' there and '4' here"):
        train(data, tmp_path, "--epochs", 1, "--epoch-iters", 1, "--resume", "auto")
    checkpoint = load(tmp_path)
    del checkpoint["classes"]  # as in the published weights
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    assert train(data, tmp_path, *test)["images"] > 0


def test_two_processes_count_each_image_once(tmp_path):
    """Of srun. One rank meets the damaged training image, the other one that of the test."""
    data = make_data(tmp_path)
    bad = damage(data / "train"), damage(data / "val")
    more = ("--epochs", 1, "--epoch-iters", 4)
    command = [sys.executable, "tools/train_imagenet.py", *arguments(data, tmp_path, *more)]
    port = free_port()
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT | slurm_variables(rank, port),
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    texts = [rank.communicate(timeout=250)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "".join(texts)[-3000:]
    result = load(tmp_path)["result"]
    alone = train(data, tmp_path, "--test-only", "--checkpoint", tmp_path / "checkpoint.pth")
    for key, value in alone.items():
        assert result[key] == pytest.approx(value), key
    assert result["images"] == 48 and result["bad_paths"] == [bad[1]]
    (line,) = read_log(tmp_path, "loss")  # 64 images in 4 iterations of 16: each comes once
    assert line["bad_paths"] == [bad[0]] and line["bad_images"] == 1


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", norm_names())
def test_every_norm_trains_in_either_memory_format(data, tmp_path, norm, channels_last):
    train(
        data,
        tmp_path,
        "--norm",
        norm,
        "--amp",
        *["--channels-last"] * channels_last,
        "--batch-size",
        64,
        "--epochs",
        5,
        "--epoch-iters",
        3,
        "--no-augment",
        "--lr",
        0.05,
        "--schedule",
        "cosine",
        "--warmup-epochs",
        1,
        "--label-smoothing",
        0,
    )
    torch.manual_seed(0)
    before = dict(build_classifier("small", norm, 2, 32, 10).named_parameters())
    after = load(tmp_path)["model"]
    assert all(not torch.equal(value, after[name]) for name, value in before.items())
    lines = read_log(tmp_path, "loss")
    assert [line["rejected_batches"] for line in lines] == [0] * 5
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    # The rate of the last iteration of each epoch: grown in the first one, cosine over four.
    assert lines[0]["lr"] == pytest.approx(0.05) and lines[-1]["lr"] == pytest.approx(
        0.00085, rel=0.01
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_every_arch_takes_mabn(arch):
    with torch.device("meta"):
        model = build_classifier(arch, "mabn", 2, 32, 1000)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 1000)
    depth = {"resnet18": 20, "resnet34": 36, "resnet101": 104, "resnet152": 155}.get(arch, 53)
    norms = [m for m in model.modules() if isinstance(m, MABN2d)]
    assert len(norms) == depth and all(type(norm) is SplitMABN2d for norm in norms)


def test_published_classifier_loads(tmp_path):
    """A file with the names and shapes of R50-wc.pth, as --test-only --checkpoint takes it."""
    shapes = json.loads((ROOT / "tests/golden/r50_classification_keys.json").read_text())
    state = {name: torch.rand(shape) for name, shape in shapes.items()}
    torch.save(
        {"model": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "R50.pth"
    )
    model = build_classifier("resnet50", "mabn", 2, 32, 1000)
    args = parse_args(["--data", "", "--test-only", "--checkpoint", "R50.pth"])
    load_checkpoint(model, tmp_path / "R50.pth", args)
    found = model.state_dict()
    assert not {name for name in state if "sta_matrix" not in name} - found.keys()
    for name in ("conv1.weight", "layer4.2.bn3.running_var", "fc.bias"):
        assert torch.equal(found[name], state[name])


@pytest.mark.parametrize(
    "more, message",
    [
        (("--norm-batch", 3), "multiple of batch_size"),
        (("--norm-batch", 16), "--norm-batch 16 is larger than --batch-size 8: use at most 8"),
        (("--norm-option", "warmup=3"), "argument '?warmup"),
        (("--norm-option", "warmup"), "--norm-option takes NAME=VALUE"),
        (("--norm-option", "batch_size=4"), "--norm-option batch_size=4: use --norm-batch 4"),
        (("--norm", "gn", "--norm-option", "eps=1"), "takes no settings"),
        (("--device", "gpu"), "--device gpu: use cpu or cuda"),
        (("--device", "cuda:99"), "--device cuda:99, but torch sees "),
        (("--label-smoothing", 2), "--label-smoothing 2.0: use a number from 0 to 1"),
        (("--epoch-iters", -5), "--epoch-iters -5: use a number 0 or more"),
        (("--checkpoint-period", -1), "--checkpoint-period -1: use"),
        (("--lr", "nan"), "--lr nan: use a number above 0"),
        (("--warmup-epochs", -1), "--warmup-epochs -1.0: use"),
        (("--warmup-epochs", 2), "--warmup-epochs 2 leaves nothing of --epochs 2: use less"),
        (("--test-only",), "--test-only needs --checkpoint FILE"),
    ],
)
def test_bad_arguments_are_named(tmp_path, more, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(arguments("no data", tmp_path / "out", *more))
    assert re.search(f"error: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more", [("--norm", "gn"), ("--norm", "syncbn"), ("--test-only", "--checkpoint", "file")]
)
def test_a_normalization_batch_that_does_not_matter(more):
    parse_args(arguments("no data", "out", "--norm-batch", 16, *more))


def test_errors_of_a_training(data, tmp_path):
    with pytest.raises(ValueError, match="can't read nothing.pth"):
        train(data, tmp_path, "--test-only", "--checkpoint", "nothing.pth")
    with pytest.raises(FloatingPointError, match="not finite: lower --lr"):
        train(data, tmp_path, "--lr", 1e9, "--epoch-iters", 20)


def test_errors_before_data_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/out can't be written to: Not a directory"):
        train("no data", tmp_path / "file/out")
    (tmp_path / "checkpoint.pth").touch()
    with pytest.raises(ValueError, match="holds a run: add --resume auto"):
        train("no data", tmp_path)
    with pytest.raises(ImagesError, match="there is no folder no data/train"):
        train("no data", tmp_path / "other")
    for name, value in slurm_variables(0, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="syncbn over several processes needs GPUs"):
        train("no data", tmp_path / "other", "--norm", "syncbn")
    assert not (tmp_path / "other").exists()


def test_weights_that_would_compute_something_else(data, tmp_path):
    once = ("--epochs", 1, "--epoch-iters", 1)
    train(data, tmp_path, *once, "--norm-option", "warmup_iters=7")
    test = ("--test-only", "--checkpoint", tmp_path / "checkpoint.pth")
    assert train(data, tmp_path, *test)["images"] > 0  # warmup_iters matters in a training only
    with pytest.raises(CheckpointError, match="trained without --bgr255: leave out --bgr255"):
        train(data, tmp_path, *test, "--bgr255")
    message = "with --norm-option eps=its default, not 0.5: give the same"
    for more in (test, (*once, "--output", tmp_path / "new", *test[1:])):
        with pytest.raises(CheckpointError, match=message):
            train(data, tmp_path, *more, "--norm-option", "eps=0.5")


def test_checkpoint_of_another_run_is_refused_and_kept(data, tmp_path):
    train(data, tmp_path, "--epochs", 1)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    for more, message in (
        (("--norm", "gn"), "of --norm mabn, not gn"),
        (("--arch", "resnet18"), "of --arch small, not resnet18"),
        (("--lr", 0.1, "--workers", 1), "a run with --epochs 1, not 2; --lr 0.02, not 0.1: go on"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(data, tmp_path, *more, "--resume", "auto")
    (make_data(tmp_path) / "train/9/more.png").write_bytes(b"")  # the order would be another one
    with pytest.raises(CheckpointError, match="a run with training images 64, not 65: go on"):
        train(tmp_path / "crops", tmp_path, "--epochs", 1, "--resume", "auto")
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    torch.save(load(tmp_path)["model"], tmp_path / "checkpoint.pth")
    with pytest.raises(
        CheckpointError, match="lacks args, iteration, optimizer, result: start from"
    ):
        train(data, tmp_path, "--resume", "auto")
