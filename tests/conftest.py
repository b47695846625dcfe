import logging
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

# Before torch is imported: threads that spin while they wait slow shared cores down.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

from paths import ROOT

# No deadline: a shared machine stalls. `make fuzz` selects the other by --hypothesis-profile.
hypothesis.settings.register_profile("default", deadline=None, max_examples=100)
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=500)
hypothesis.settings.load_profile("default")


def pytest_configure(config):
    """Keep the datasets of the tests, and of the processes that they start, out of the user's."""
    config._datasets = tempfile.TemporaryDirectory(prefix="mabn_d2-datasets-")
    os.environ["DETECTRON2_DATASETS"] = config._datasets.name


def pytest_unconfigure(config):
    config._datasets.cleanup()


def pytest_collection_modifyitems(config, items):
    """Leave out the tests that this machine can't run, rather than report them as skipped."""
    detectron2 = Path(find_spec("detectron2").origin).parent
    evaluators = detectron2 / "evaluation" / "cityscapes_evaluation.py"
    available = {
        "gpu": torch.cuda.is_available(),
        "compiled_detectron2": find_spec("detectron2._C") is not None,
        "cityscapes": "deeplearning" not in evaluators.read_text(),  # a package that only Meta has
    }
    missing = [mark for mark, is_available in available.items() if not is_available]
    out = [item for item in items if any(map(item.get_closest_marker, missing))]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def log_reaches_caplog():
    """Undo what a command has done that another test ran in this process (`setup_logger`)."""
    logging.getLogger("mabn_d2").propagate = True


@pytest.fixture(scope="module", params=["compiled", "torch"])
def operators(request):
    """Run a module's tests with the compiled CPU operators and with torch's alone."""
    from mabn_d2.layers.ops import cpu_ops

    if request.param == "compiled":
        if cpu_ops.OPERATORS is None:
            pytest.skip("this installation has no compiled operators")
        yield cpu_ops.OPERATORS
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_ops, "OPERATORS", None)
            yield None


@pytest.fixture(scope="session")
def small_scenes(tmp_path_factory):
    """Register digit scenes of 24 and 6 images as small_scenes_{train,val}."""
    from mabn_d2.data import register_digit_scenes
    from mabn_d2.data.digit_scenes import SceneParams

    root = tmp_path_factory.mktemp("scenes")
    register_digit_scenes(str(root), "small_scenes", SceneParams(num_train=24, num_val=6))
    return root / "small_scenes"


@pytest.fixture
def digits_cfg(small_scenes, tmp_path):
    """The digits config, narrower, on the small scenes, on CPU, writing to tmp_path."""
    from detectron2.config import get_cfg

    from mabn_d2 import add_mabn_config

    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/digits/scratch_mask_rcnn_R18_FPN_mabn.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_any_norm_resnet_fpn_backbone"  # tests set other norms
    cfg.MODEL.RESNETS.DEPTH = 10
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("small_scenes_train",), ("small_scenes_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.MAX_ITER = 4
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param
