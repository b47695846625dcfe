"""An error that a user can correct is one line and exit status 1, by the commands themselves."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from commands import CONFIG, SMALL, exit_line, lines, train
from mabn_d2.checkpoint import write_checkpoint
from mabn_d2.commands import demo
from mabn_d2.engine import read_config
from paths import ROOT


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["MODEL.MABN.WARMUP", 3], "MODEL.MABN.WARMUP"),
        (["MODEL.FPN.NORM", "MABM"], "MODEL.FPN.NORM: unknown norm 'MABM'"),
        (["MODEL.MABN.BATCH_SIZE", 3], "BATCH_SIZE (3) does not divide"),
        (["SOLVER.IMS_PER_BATCH", 3], "multiple of the 2"),
        (["SOLVER.MAX_ITER"], "SOLVER.MAX_ITER has no value: write KEY VALUE"),
        (["SOLVER.MAX_ITER", "SEED", 3], "SOLVER.MAX_ITER has no value: write KEY VALUE"),
        (["SOLVER.MAX_ITER=5"], "write the key and the value as two, SOLVER.MAX_ITER 5"),
        (["SOLVER.MAX_ITER=5", "SEED=3"], "as two, SOLVER.MAX_ITER 5"),
        (["SEED", 3, "--resume"], "--resume comes after the first key: put it before the keys"),
        (["SEED", 3, "--num-machines", 1], "--num-machines comes after the first key"),
        (["SOLVER.MAX_ITER", "abc"], "SOLVER.MAX_ITER is abc (str): use a value of type int"),
        (
            ["SOLVER.BASE_LR", 1],
            "SOLVER.BASE_LR is 1 (int): use a value of type float, such as 1.0",
        ),
        (
            ["DATASETS.TRAIN", "mine"],
            "DATASETS.TRAIN is mine (str): use a value of type tuple, such ",
        ),
        (["DATASETS.TEST", ("digit_scene_val",)], "registered (did you mean digit_scenes_val?)"),
        (["SOLVER.STEPS", 5], "such as (5,)"),
        (["SOLVER.BASE_LR.X", 3], "SOLVER.BASE_LR.X is no config key: SOLVER.BASE_LR is a value"),
        (
            ["DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler"]
            + ["DATASETS.TRAIN_REPEAT_FACTOR", "[1, 2]"],
            "DATASETS.TRAIN_REPEAT_FACTOR is [1, 2]: give pairs",
        ),
        (
            ["MODEL.MABN.LOG_PERIOD", 5, "MODEL.MABN.LOG_LAYERS", ("stem",)],
            "did you mean backbone",
        ),
        (["MODEL.MABN", 3], "set one of them, such as MODEL.MABN.BATCH_SIZE"),
        (["MODEL", 3], "MODEL is 3, but it has keys of its own: set one of them, such as MODEL."),
        (
            ["--config-file", "configs/mask_rcnn_R50_FPN_mabn_2.yaml"],
            "(did you mean configs/mask_rcnn_R50_FPN_mabn_2x.yaml?)",
        ),
        (["--config-file", "configs"], "--config-file is 'configs', which is no file"),
        (["--config-file", ""], "--config-file is missing: name one, such as configs/own_data"),
        (["MODEL.WEIGHTS", "weights/R50-wc.pth"], "convert_weights.py imagenet"),
        (["--num-gpus", 0, "--num-machines", 2], "--num-gpus 0 with --num-machines 2"),
    ],
)
def test_bad_config(arguments, message, tmp_path, monkeypatch):
    base = ["--config-file", CONFIG, "--num-gpus", 2, "OUTPUT_DIR", tmp_path]
    if arguments[0].startswith("--"):
        base, arguments = base[:2] + arguments, []
    assert message in exit_line(monkeypatch, "train_net.py", *base, *arguments)


def test_bad_config_of_other_tools(tmp_path, monkeypatch):
    bad = ["SOLVER.FOO", 1]
    for tool, arguments in (
        ("demo.py", ["--num-gpus", 0, "OUTPUT_DIR", tmp_path, *bad]),
        ("compare_norms.py", ["--output", tmp_path, "--set", *bad]),
    ):
        assert "SOLVER.FOO" in exit_line(monkeypatch, tool, *arguments)
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--eval-only"], ["--num-machines", "2"], ["--num-gpus", "2"]])
def test_flags_that_the_demo_would_ignore(flags, capsys):
    with pytest.raises(SystemExit):
        demo.parse_args(flags)
    assert "the demo trains in one process: use tools/train_net.py" in capsys.readouterr().err


def test_real_process_and_its_traceback(tmp_path, monkeypatch):
    command = ["--num-gpus", 2, "OUTPUT_DIR", tmp_path, "SOLVER.FOO", 1]
    done = train(*command)
    (line,) = lines(done.stderr)
    assert done.returncode == 1 and line.startswith("train_net.py: ") and "SOLVER.FOO" in line
    monkeypatch.setenv("MABN_D2_TRACEBACK", "1")
    assert "Traceback" in train(*command).stderr


class Hostile:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


LAZY = """
from detectron2.config import LazyConfig
globals().update(LazyConfig.load({twin!r}))
train.output_dir, train.init_checkpoint = {output!r}, {weights!r}
del dataloader.evaluator  # its images are not here
"""


def hostile_commands(folder, weights):
    """Return {name: command} of all that read a checkpoint; `folder`/output is to be resumed."""
    output = folder / "output"
    output.mkdir()
    (output / "last_checkpoint").write_text(weights.name)
    os.link(weights, output / weights.name)
    os.link(weights, output / "checkpoint.pth")  # what --resume auto looks for
    for split in ("train", "val"):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(folder / split / name / "0.png")
    twin = str(ROOT / "configs/lazy/mask_rcnn_R50_FPN_mabn_2x.py")
    lazy = folder / "lazy.py"
    lazy.write_text(LAZY.format(twin=twin, output=str(folder / "lazy"), weights=str(weights)))
    net = ["train_net.py", "--num-gpus", 0, "--config-file", CONFIG]
    there, new = ["OUTPUT_DIR", output], ["OUTPUT_DIR", folder / "new", "MODEL.WEIGHTS", weights]
    convert, out = "convert_weights.py", folder / "out.pth"
    classify = [
        "train_imagenet.py",
        "--data",
        folder,
        "--arch",
        "small",
        "--workers",
        0,
        "--crop",
        32,
        "--val-resize",
        32,
        "--device",
        "cpu",
    ]
    return {
        "train --resume": [*net, "--resume", *there],
        "train MODEL.WEIGHTS": [*net, *new],
        "train --eval-only": [*net, "--eval-only", *new],
        "lazy --eval-only": ["lazyconfig_train_net.py", "--num-gpus", 0, "--eval-only",
                             "--config-file", lazy],
        "convert imagenet": [convert, "imagenet", weights, out],
        "convert detector": [convert, "detector", weights, out],
        "convert fold": [convert, "fold", "--config-file", CONFIG, weights, out],
        "predict": ["predict.py", "--checkpoint", weights, folder / "train"],
        "classify --checkpoint": [*classify, "--checkpoint", weights],
        "classify --resume": [*classify, "--output", output, "--resume", "auto"],
    }  # fmt: skip


COMMANDS = ["train --resume", "train MODEL.WEIGHTS", "train --eval-only", "lazy --eval-only",
            "convert imagenet", "convert detector", "convert fold", "predict",
            "classify --checkpoint", "classify --resume"]  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("name", COMMANDS)
def test_hostile_checkpoint(name, suffix, tmp_path, monkeypatch):
    """Refused by every command, nothing of it run."""
    trap, weights = tmp_path / "trap", tmp_path / f"hostile{suffix}"
    data = {"model": {"w": Hostile(trap)}, "__author__": "x"}
    torch.save(data, weights) if suffix == ".pth" else weights.write_bytes(pickle.dumps(data))
    line = exit_line(monkeypatch, *hostile_commands(tmp_path, weights)[name])
    assert "is refused" in line and "mkdir" in line and not trap.exists()
    if suffix == ".pkl":
        pickle.loads(weights.read_bytes())
        assert trap.exists()  # the file would have done it


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_damaged_images(tmp_path, monkeypatch, processes):
    """In training and in evaluation, read by a worker: the path, from every process."""
    DatasetCatalog.get("digit_scenes_train")  # makes them
    made = Path(MetadataCatalog.get("digit_scenes_train").image_root).parent
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    opts = [str(part) for part in SMALL]
    model = build_model(read_config(str(ROOT / CONFIG), ["MODEL.DEVICE", "cpu", *opts]))
    write_checkpoint({"model": model.state_dict()}, tmp_path / "weights.pth")
    evaluation = ["--eval-only", "MODEL.WEIGHTS", tmp_path / "weights.pth"]
    for split, flags in (("train", []), ("val", evaluation)):
        shutil.rmtree(tmp_path / "digit_scenes", ignore_errors=True)
        shutil.copytree(made, tmp_path / "digit_scenes")
        for path in (tmp_path / "digit_scenes" / split).iterdir():
            os.truncate(path, 1000)
        done = train("--num-gpus", processes, "--dist-url", "auto", *flags, *SMALL,
                     "OUTPUT_DIR", tmp_path / "output")  # fmt: skip
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        (line, *_) = [line for line in lines(done.stderr) if "can't be used" in line]
        assert line.startswith(f"train_net.py: {tmp_path}/digit_scenes/{split}/0")
