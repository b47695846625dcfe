"""tools/convert_weights.py, as a user calls it."""

import importlib.util
import os
import pickle
import subprocess
import sys

import pytest
import torch

from detectors import assert_same_instances, narrow_cfg, randomized, scenes
from mabn_d2 import load_predictor
from mabn_d2.checkpoint import read_checkpoint, write_checkpoint
from mabn_d2.modeling.norm import build_model
from maskrcnn_benchmark import published_state
from paths import ROOT
from published_resnet import PublishedResNet

SCRIPT = ROOT / "tools/convert_weights.py"

# What a user of stock Detectron2 does, without this package.
STOCK = """
import sys, torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

config, weights, images, output = sys.argv[1:]
cfg = get_cfg()
cfg.merge_from_file(config)
cfg.MODEL.DEVICE = "cpu"
model = build_model(cfg).eval()
assert cfg.MODEL.WEIGHTS == weights
print(model.load_state_dict(torch.load(weights, weights_only=True)["model"], strict=True))
with torch.no_grad():
    outputs = model(torch.load(images))
assert not any(name.split(".")[0] == "mabn_d2" for name in sys.modules)
torch.save(outputs, output)
"""


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("into", ["frozen_bn", "conv"])
def test_fold_then_stock_detectron2(into, tmp_path):
    cfg = narrow_cfg()
    model = randomized(build_model(cfg))
    cfg.SOLVER.IMS_PER_BATCH = (
        12  # in windows of 32: a warning, which is no part of the stock config
    )
    # The config comes from the file, or from the checkpoint.
    (tmp_path / "config.yaml").write_text(cfg.dump())
    classes = [{"id": i + 1, "name": f"digit {i}"} for i in range(10)]
    described = {"config": cfg.dump(), "classes": classes} if into == "conv" else {}
    given = [] if described else ["--config-file", tmp_path / "config.yaml"]
    write_checkpoint({"model": model.state_dict(), **described}, tmp_path / "model_final.pth")
    folded, stock_config = tmp_path / "folded.pth", tmp_path / "stock.yaml"
    done = run(
        SCRIPT,
        "fold",
        *given,
        "--into",
        into,
        tmp_path / "model_final.pth",
        folded,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the window spans 36") == 1
    stock_config.write_text(done.stdout)
    torch.save(scenes(), tmp_path / "images.pt")
    done = run("-c", STOCK, stock_config, folded, tmp_path / "images.pt", tmp_path / "out.pt")
    assert "All keys matched" in done.stdout, done.stderr
    outputs = torch.load(tmp_path / "out.pt", weights_only=False)
    with torch.no_grad():
        assert_same_instances(model(scenes()), outputs, rtol=1e-5 if into == "frozen_bn" else 1e-4)
    # The folded file holds the stock config, and the classes if they are known.
    predictor = load_predictor(folded, "cpu", 0.1)
    assert predictor.class_names == (
        [c["name"] for c in classes] if described else [f"class {i + 1}" for i in range(10)]
    )
    assert len(predictor(scenes()[0]["image"].permute(1, 2, 0).numpy()))


@pytest.fixture
def main(monkeypatch, capsys):
    """Call the script in this process: its output, or the message of its exit."""
    spec = importlib.util.spec_from_file_location("convert_weights", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
        script.main()
        return capsys.readouterr().out

    return call


def test_imagenet_and_detector(main, tmp_path):
    source, output = tmp_path / "R18.pth", tmp_path / "out.pkl"
    write_checkpoint({"model": PublishedResNet(18, width=8).state_dict()}, source)
    shown = main("imagenet", source, output, "--channel-order", "RGB", "--pixel-mean", 1, 2, 3)
    assert "INPUT.FORMAT RGB" in shown and "left out: 2 entries, the classifier" in shown
    record = read_checkpoint(output)["mabn_d2"]
    assert record["config"]["MODEL.PIXEL_MEAN"] == [1.0, 2.0, 3.0]
    written = output.read_bytes()

    write_checkpoint({"model": published_state(build_model(narrow_cfg()))}, tmp_path / "mrcnn.pth")
    shown = main("detector", tmp_path / "mrcnn.pth", output, "--overwrite", "--stride-in-3x3")
    assert "MODEL.RESNETS.STRIDE_IN_1X1 False" in shown and output.read_bytes() != written


def test_errors_write_nothing(main, tmp_path):
    source, output = tmp_path / "R18.pth", tmp_path / "out.pth"
    write_checkpoint({"model": PublishedResNet(18, width=8).state_dict()}, source)
    output.write_bytes(b"precious")
    (tmp_path / "link.pth").symlink_to(source)
    fold = ("fold", "--config-file")
    for arguments, message in (
        (("imagenet", source, output), "exists: name another, or add --overwrite"),
        (("imagenet", source, source, "--overwrite"), "is the input"),
        (("imagenet", source, tmp_path / "link.pth", "--overwrite"), "is the input"),
        (("imagenet", source, tmp_path / "out.bin"), "must end in .pth or .pkl"),
        (("imagenet", source, source / "out.pth"), "can't be written"),
        (("imagenet", tmp_path / "missing.pth", tmp_path / "new" / "a.pth"), "No such file"),
        (("imagenet", tmp_path / "missing.pth", tmp_path / "a.pth"), "No such file"),
        (("detector", source, tmp_path / "a.pth"), "entries that no rule knows"),
        ((*fold, tmp_path / "c.yaml", source, tmp_path / "a.pth"), "c.yaml"),
        (("fold", source, tmp_path / "a.pth"), "holds no config: add --config-file"),
        ((*fold, SCRIPT, source, tmp_path / "a.pth"), "--config-file"),
    ):
        with pytest.raises(SystemExit, match="^convert_weights.py: ") as exit:
            main(*arguments)
        assert message in exit.value.code and "\n" not in exit.value.code
    assert output.read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == {"R18.pth", "out.pth", "link.pth"}


def test_error_as_a_user_sees_it(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps(print))
    done = run(SCRIPT, "imagenet", tmp_path / "a.pth", tmp_path / "b.pth")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "builtins.print" in line and not (tmp_path / "b.pth").exists()
