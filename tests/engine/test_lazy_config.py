"""Mistakes in a LazyConfig are one line, before anything is trained or written."""

import sys
from argparse import Namespace

import pytest
import torch
import yaml
from detectron2.config import LazyConfig, instantiate
from detectron2.evaluation import CityscapesSemSegEvaluator
from test_lazy import USERS

from mabn_d2 import CheckpointError
from mabn_d2.checkpoint import record_of_config
from mabn_d2.engine import ConfigError
from mabn_d2.engine.lazy_config import load_lazy_config, log_or_refuse_changes, warn_of_recorded
from mabn_d2.engine.lazy_trainer import check
from paths import ROOT


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "users.py"
    twin = str(ROOT / "configs/lazy/scratch_mask_rcnn_R50_FPN_mabn_2x.py")
    path.write_text(USERS.format(twin=twin, output=str(tmp_path / "output")))
    return path


def arguments(config, *opts, resume=False, eval_only=False):
    return Namespace(config_file=str(config), opts=list(opts), num_gpus=0, num_machines=1,
                     resume=resume, eval_only=eval_only)  # fmt: skip


@pytest.mark.parametrize("options, message", [
    (["train.max_itr=5"], r"train.max_itr is unknown \(did you mean max_iter\?\)"),
    (["train.max_iter", "5"], "train.max_iter has no value: write KEY=VALUE"),
    (["train.max_iter=5", "--resume"], "--resume comes after the first key: put it before the keys"),
    (["train.max_iter=0"], "train.max_iter is 0: give a whole number of at least 1"),
    (["train.checkpointer.period=0"], "train.checkpointer.period is 0"),
    (["train.checkpointer.max_to_keep=0"], "train.checkpointer.max_to_keep is 0"),
    (["+train.checkpointer.max_to_keeep=3"], r"train.checkpointer has 'max_to_keeep' \(did you mean max_to_keep\?"),
    (["train.checkpointer=3"], "train.checkpointer has 3: give period"),
    (["+train.ddp.find_unused=True"], r"train.ddp has 'find_unused' \(did you mean find_unused_parameters\?\): give fp16_"),
    (["+train.ddp.device_ids=[1]"], "train.ddp has 'device_ids'.*: give fp16_compression"),
    (["train.amp.enabled=off"], "train.amp.enabled is 'off': use True or False"),
    (["train.amp=True"], "train.amp has True: give enabled"),
    (["+train.seed=abc"], "train.seed is 'abc': give a whole number"),
    (["dataloader.train.num_workers=-1"], "dataloader.train.num_workers is -1: give a whole number of"),
    (["dataloader.train.total_batch_size=two"], "dataloader.train.total_batch_size is 'two'"),
    (["optimizer.lr=fast"], "optimizer.lr is 'fast': give a number above 0"),
    (["optimizer.momentum=much"], "optimizer can't be used .TypeError"),
    (["lr_multiplier.warmup_length=2"], "lr_multiplier can't be used .RuntimeError: where in"),
    (["train.init_checkpoint=no.pth"], "train.init_checkpoint is 'no.pth', which does not exist"),
    (["train.accumulation_steps=4"], "dataloader.train.total_batch_size is 2, no multiple of 4"),
    (["+train.bad_input=jump"], "train.bad_input is 'jump': use \"stop\" or \"skip\""),
    (["+train.bad_input=skip", "+dataloader.train.prefetch_factor=3"], "train.bad_input is 'skip', but"),
    (["+train.pictures=-1"], "train.pictures is -1: give a whole number, 0 for none"),
    (["+train.validation_loss=3"], "train.validation_loss is 3: use True or False"),
    (["+train.best_metric=AP"], "train.best_metric is 'AP': use \"auto\""),
    (["+train.best_metric=validation/total_loss"], "which needs train.validation_loss True"),
    (["+train.early_stopping_patience=2"], "patience is 2, which needs train.best_metric and"),
    (["+train.early_stopping_patience=2", "+train.best_metric=auto", "train.eval_period=0"],
     "train.eval_period, which are 'auto' and 0"),
    (["train.mabn.momentum=7"], "train.mabn: .*momentum"),
    (["+train.mabn.warmup_iter=3"], "train.mabn: .*warmup_iter"),
    (["+train.statistics.perod=20"], "train.statistics: .*perod"),
    (["+train.statistics.period=20", "+train.statistics.layers=[stem]"], "train.statistics: .* named 'stem'; there are"),
    (["model.roi_heads.num_clases=3"], "no model can be built from the config.*num_clases"),
    (["model.backbone.bottom_up.stem.norm=MABM"], "MABM"),
])  # fmt: skip
def test_mistakes(config, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        check(arguments(config, *options))
    assert "\n" not in str(error.value) and not (tmp_path / "output").exists()


VIT = """
from detectron2.config import LazyCall as L
from detectron2.modeling import SimpleFeaturePyramid, ViT
model.backbone = L(SimpleFeaturePyramid)(
    net=L(ViT)(img_size=64, embed_dim=8, depth=2, num_heads=2, window_size=2, out_feature="last_feat"),
    in_feature="${.net.out_feature}", out_channels=16, scale_factors=(4.0, 2.0, 1.0, 0.5),
    top_block=L(LastLevelMaxPool)(), norm="LN", square_pad=64,
)
"""
SWIN = """
from detectron2.config import LazyCall as L
from detectron2.modeling import SwinTransformer
model.backbone.bottom_up = L(SwinTransformer)(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
model.backbone.in_features = ["p0", "p1", "p2", "p3"]
"""
FPN = "from detectron2.modeling.backbone.fpn import LastLevelMaxPool\n"


@pytest.mark.parametrize("backbone", [FPN + VIT, SWIN])
def test_backbones_that_need_data(backbone, config, tmp_path):
    """They read their drop rates from a tensor, which has no values on the meta device."""
    config.write_text(f"{config.read_text()}{backbone}")
    cfg = load_lazy_config(arguments(config))
    weights = tmp_path / "weights.pth"
    torch.save({"model": instantiate(cfg.model).state_dict()}, weights)
    for eval_only in (False, True):
        check(arguments(config, f"train.init_checkpoint={weights}", eval_only=eval_only))
    with pytest.raises(ConfigError, match="no model can be built from the config.*num_clases"):
        check(arguments(config, "model.roi_heads.num_clases=3"))
    with pytest.raises(CheckpointError, match="train.init_checkpoint: .*need all"):
        options = (f"train.init_checkpoint={weights}", "model.roi_heads.num_classes=3")
        check(arguments(config, *options, eval_only=True))


def test_settings_of_processes(config):
    check(
        arguments(
            config, "+train.ddp.find_unused_parameters=True", "+train.ddp.fp16_compression=True"
        )
    )


def test_windows_of_other_images(config, caplog):
    check(arguments(config, "dataloader.train.total_batch_size=8", "train.accumulation_steps=2"))
    (line,) = [line for line in caplog.messages if "windows" in line]
    assert line.startswith("train.mabn.batch_size is 2, but one forward has 4 images")
    assert line.endswith("span 64 images, not 32: set train.mabn.batch_size=4")


def test_missing_key(config):
    config.write_text(f"{config.read_text()}\ndel train.amp\n")
    with pytest.raises(ConfigError, match="train.amp is missing: give it a value"):
        check(arguments(config))


def test_norms_that_never_start(config, caplog):
    check(arguments(config, "train.max_iter=100", "train.mabn.warmup_iters=100"))
    assert "train.mabn.warmup_iters is 100 and train.max_iter 100: the moving" in caplog.text
    caplog.clear()
    check(arguments(config, "train.max_iter=101"))
    assert not [line for line in caplog.messages if "train.max_iter" in line]


def test_missing_packages(config, monkeypatch):
    """Of one evaluator, and of one in a list."""
    text = config.read_text()
    for package, line in (
        ("lvis", "dataloader.evaluator = L(LVISEvaluator)(dataset_name='small_scenes_val')"),
        (
            "panopticapi",
            "dataloader.evaluator = [dataloader.evaluator, L(COCOPanopticEvaluator)(dataset_name='x')]",
        ),
    ):
        config.write_text(
            f"{text}\nfrom detectron2.config import LazyCall as L\n"
            f"from detectron2.evaluation import COCOPanopticEvaluator, LVISEvaluator\n{line}\n"
        )
        check(arguments(config))
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)  # as Python sees a package that is not there
            with pytest.raises(
                ConfigError, match=f"needs the package {package}: install it with pip"
            ):
                check(arguments(config))


def test_a_package_that_only_meta_has(config, monkeypatch):
    """Versions of Detectron2 from 2026 import it for Cityscapes."""

    def process(self, inputs, outputs):
        import deeplearning.projects.cityscapesApi  # noqa: F401

    monkeypatch.setattr(CityscapesSemSegEvaluator, "process", process)
    config.write_text(
        f"{config.read_text()}\nfrom detectron2.config import LazyCall as L\n"
        "from detectron2.evaluation import CityscapesSemSegEvaluator\n"
        "dataloader.evaluator = L(CityscapesSemSegEvaluator)(dataset_name='x')\n"
    )
    with pytest.raises(ConfigError, match="needs the package deeplearning: only Meta has it; use"):
        check(arguments(config))


def test_missing_file_and_evaluation_without_weights(config, tmp_path):
    with pytest.raises(ConfigError, match="--config-file is .*no.py', which is no file: correct"):
        check(arguments(tmp_path / "no.py"))
    with pytest.raises(ConfigError, match="--config-file is missing: name one, such as .*2x.py"):
        check(arguments(""))
    with pytest.raises(
        ConfigError, match=r"did you mean configs/lazy/mask_rcnn_R50_FPN_mabn_2x.py\?"
    ):
        check(arguments("lazy/mask_rcnn_R50_FPN_mabn.py"))
    with pytest.raises(ConfigError, match="train.init_checkpoint is '', but --eval-only needs"):
        check(arguments(config, eval_only=True))


def test_weights_of_another_norm(config, tmp_path):
    path = tmp_path / "bn.pth"
    stem = "backbone.bottom_up.stem.conv1"
    state = {f"{stem}.norm.{entry}": torch.ones(64) for entry in
             ("weight", "bias", "running_mean", "running_var")}  # fmt: skip
    torch.save({"model": {f"{stem}.weight": torch.ones(64, 3, 7, 7), **state}}, path)
    with pytest.raises(CheckpointError, match="train.init_checkpoint: .*BatchNorm where .* MABN"):
        check(arguments(config, f"train.init_checkpoint={path}"))
    for name in (path, f"'{path}?matching_heuristics=True'"):
        check(arguments(config, f"train.init_checkpoint={name}", "train.convert_weights=True"))
    assert not (tmp_path / "output").exists()


def test_input_that_weights_were_trained_with(config, caplog):
    """What converted weights record, and what the config in a checkpoint of `Trainer` says."""
    cfg = load_lazy_config(arguments(config))
    trained = {
        "INPUT": {"FORMAT": "RGB"},
        "MODEL": {"PIXEL_MEAN": [0.0, 0.0, 0.0], "PIXEL_STD": list(cfg.model.pixel_std)},
    }
    warn_of_recorded(record_of_config({"config": yaml.safe_dump(trained)}), cfg)
    warn_of_recorded(None, cfg)
    assert [r.getMessage().partition(": ")[0] for r in caplog.records] == [
        "dataloader.train.mapper.image_format is BGR, the weights were trained with RGB",
        f"model.pixel_mean is {list(cfg.model.pixel_mean)}, the weights were trained with "
        "[0.0, 0.0, 0.0]",
    ]


def test_folder_of_another_run(config, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(
        ConfigError, match="train.output_dir .* holds the checkpoints of a run: add"
    ):
        check(arguments(config))
    cfg = load_lazy_config(arguments(config))
    LazyConfig.save(cfg, str(output / "config.yaml"))
    assert log_or_refuse_changes(cfg) == []
    changes = log_or_refuse_changes(load_lazy_config(arguments(config, "optimizer.lr=0.5")))
    assert changes == ["optimizer.lr 0.001 -> 0.5"]
    threshold = "model.roi_heads.box_predictor.test_score_thresh"
    changes = log_or_refuse_changes(load_lazy_config(arguments(config, f"{threshold}=0.5")))
    assert changes == [f"{threshold} 0.05 -> 0.5"]
    for option in ("model.roi_heads.num_classes=3", "dataloader.train.dataset.names=small_scenes_val",
                   "optimizer._target_=torch.optim.AdamW"):  # fmt: skip
        with pytest.raises(ConfigError, match=option.partition("=")[0]):
            log_or_refuse_changes(load_lazy_config(arguments(config, option)))
