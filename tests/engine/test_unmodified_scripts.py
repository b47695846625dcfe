"""DETECTRON2_ENV_MODULE=mabn_d2: scripts that do not know this package, run as processes."""

import os
import pickle
import subprocess
import sys

import torch
from detectron2.data import DatasetCatalog

from mabn_d2 import MABN2d
from mabn_d2.engine.unmodified_scripts import with_rescaled_windows
from paths import ROOT

# What Detectron2's own tools/train_net.py does; it knows nothing of this package.
SCRIPT = """
import sys
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.utils.logger import setup_logger

DatasetCatalog.register("small_scenes_train", lambda: __import__("pickle").load(open({data!r}, "rb")))
MetadataCatalog.get("small_scenes_train").set(thing_classes=list("0123456789"))
setup_logger(name="mabn_d2")
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
cfg.merge_from_list(sys.argv[2:])
trainer = DefaultTrainer(cfg)
trainer.resume_or_load(resume=False)
trainer.train()
from detectron2.engine import AMPTrainer
print("scaled windows:", hasattr(AMPTrainer.run_step, "__wrapped__"))
"""


def run(code, *arguments):
    environment = {**os.environ, "DETECTRON2_ENV_MODULE": "mabn_d2", "PYTHONPATH": str(ROOT),
                   "PYTHONWARNINGS": "ignore"}  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, timeout=280,
        capture_output=True, text=True,
    )  # fmt: skip


def test_a_run_from_its_own_config(digits_cfg, tmp_path):
    """config.yaml loads; PRECISE_BN recalibrates; the checkpoint is as of SafeCheckpointer."""
    data = tmp_path / "data.pkl"
    data.write_bytes(pickle.dumps(DatasetCatalog.get("small_scenes_train")))
    digits_cfg.DATASETS.TEST, digits_cfg.SOLVER.MAX_ITER = (), 1
    digits_cfg.TEST.PRECISE_BN.ENABLED, digits_cfg.TEST.PRECISE_BN.NUM_ITER = True, 1
    digits_cfg.TEST.EVAL_PERIOD, digits_cfg.DATALOADER.BAD_INPUT = 0, "skip"
    (tmp_path / "output").mkdir()
    config = tmp_path / "output/config.yaml"
    config.write_text(digits_cfg.dump())
    done = run(SCRIPT.format(data=str(data)), config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "recalibrating MABN on 1 batches" in done.stdout
    assert "DefaultTrainer does not read DATALOADER.BAD_INPUT: use mabn_d2" in done.stdout
    assert "scaled windows: True" in done.stdout
    state = torch.load(tmp_path / "output/model_final.pth", weights_only=False)["model"]
    assert not state["backbone.bottom_up.stem.conv1.norm.running_var"].eq(1).any()
    # Weights of another norm.
    state = {k.replace("running_var", "running_mean"): v for k, v in state.items()} | state
    torch.save({"model": state}, tmp_path / "bn.pth")
    done = run(SCRIPT.format(data=str(data)), config, "MODEL.WEIGHTS", tmp_path / "bn.pth")
    assert done.returncode == 1 and "BatchNorm where the model has MABN" in done.stderr


def test_windows_follow_the_loss_scale():
    class Run:  # AMPTrainer needs CUDA
        model = MABN2d(3)
        grad_scaler = torch.amp.GradScaler("cpu", 4.0, growth_interval=1)

        @with_rescaled_windows
        def run_step(self):
            optimizer = torch.optim.SGD(self.model.parameters(), 0.0)
            y = self.model(torch.randn(2, 3, 4, 4, requires_grad=True))
            self.grad_scaler.scale(y.sin().sum()).backward()
            self.written = self.model.buffer_gz.clone()
            self.grad_scaler.step(optimizer)
            self.grad_scaler.update()

    run = Run()
    for _ in range(2):
        run.run_step()
        assert run.written.any() and torch.equal(run.model.buffer_gz, 2 * run.written)


class Hostile:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_files_run_no_code(tmp_path):
    trap = tmp_path / "trap"
    weights, config = tmp_path / "a.pkl", tmp_path / "a.yaml"
    weights.write_bytes(pickle.dumps({"model": {"w": Hostile(str(trap))}, "__author__": "x"}))
    config.write_text(f"MODEL: {{WEIGHTS: !!python/object/apply:os.mkdir [{str(trap)!r}]}}")
    read = "from detectron2.checkpoint import DetectionCheckpointer; import torch, sys\n"
    read += "DetectionCheckpointer(torch.nn.Linear(1, 1)).load(sys.argv[1])"
    merge = (
        "from detectron2.config import get_cfg; import sys; get_cfg().merge_from_file(sys.argv[1])"
    )
    for code, path in ((read, weights), (merge, config)):
        done = run(code, path)
        assert done.returncode == 1 and "is refused" in done.stderr and not trap.exists()


def test_import_of_this_package_first(tmp_path):
    code = (
        "import mabn_d2\n"
        "from detectron2.config import get_cfg\n"
        "from detectron2.config.config import get_cfg as stock\n"
        "assert 'MABN' in get_cfg().MODEL and 'MABN' not in stock().MODEL\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr[-2000:]
