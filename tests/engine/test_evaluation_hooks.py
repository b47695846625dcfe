"""What follows from an evaluation: validation loss, best checkpoint, early stopping, pictures."""

import copy
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mabn_d2.checkpoint import SafeCheckpointer
from mabn_d2.engine import ConfigError, Trainer, check_config
from mabn_d2.engine.hooks import BestCheckpoint, LogSlowIterations
from mabn_d2.engine.hooks.best_checkpoint import best_metric
from mabn_d2.engine.metric_check import check_best_metric, scalars
from mabn_d2.engine.report import ap_tables, report_run
from mabn_d2.engine.validation_loss import build_validation_loader, validation_losses
from mabn_d2.visualization import plot_run, prediction_pictures, read_metrics
from nested import flat
from paths import ROOT

NODES = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


class Told(Trainer):
    """A trainer whose evaluations give the values of a list, one after another."""

    values = ()

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        values = cls.values
        value = values.pop(0)
        return {"bbox": {"AP": value}, "segm": {"AP": value}}


def told(cfg, *values):
    return type("Told", (Told,), {"values": list(values)})(cfg)


@pytest.fixture
def cfg(digits_cfg):
    digits_cfg.SOLVER.MAX_ITER, digits_cfg.TEST.EVAL_PERIOD = 8, 1
    digits_cfg.SOLVER.CHECKPOINT_PERIOD = 2
    digits_cfg.TEST.BEST_METRIC = "auto"
    digits_cfg.TEST.DETECTIONS_PER_IMAGE = 5
    return digits_cfg


def saved(cfg, name):
    return torch.load(Path(cfg.OUTPUT_DIR, name), weights_only=False)


def iterations_of(cfg, name):
    state = saved(cfg, name)
    iters = state["model"]["backbone.bottom_up.stem.conv1.norm.iters"].item()
    assert state["iteration"] == iters - 1
    return iters


def best_of(cfg):
    return json.loads(Path(cfg.OUTPUT_DIR, "model_best.json").read_text())


@pytest.mark.parametrize(
    "values, best",
    [
        ([1, 5, 3, 4, 5, 2, 1, 1], 2),
        ([1, 2, 3, 4, 5, 6, 7, 8], 8),
        ([np.nan, np.nan, 1, np.nan, 0, 0, np.inf, 1], 3),
    ],
)
def test_best_checkpoint(cfg, values, best):
    told(cfg, *values).train()
    assert iterations_of(cfg, "model_best.pth") == best
    assert best_of(cfg) == {
        "metric": "segm/AP", "value": values[best - 1], "iterations": best, "evaluated": 8,
    }  # fmt: skip
    # A resumed run goes on from the last checkpoint.
    assert Path(cfg.OUTPUT_DIR, "last_checkpoint").read_text() == "model_final.pth"


def test_each_evaluation_of_a_short_training_is_written_and_plotted(cfg):
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 5, 2
    told(cfg, 1, 3, 2).train()
    found = {r["iteration"]: r["segm/AP"] for r in read_metrics(cfg.OUTPUT_DIR) if "segm/AP" in r}
    assert found == {1: 1, 3: 3, 5: 2}
    figures = []
    with patch(
        "mabn_d2.visualization.save_figure", lambda figure, *_, **__: figures.append(figure)
    ):
        plot_run(cfg.OUTPUT_DIR, "curves.png")
    lines = {line.get_label(): line for axes in figures[0].axes for line in axes.lines}
    assert list(lines["segm/AP"].get_xdata()) == [2, 4, 5]


@pytest.mark.parametrize(
    "metric, lower",
    [
        ("blossom_val/segm/AP", False),
        ("bbox/AP-blossom", False),
        ("validation/total_loss", True),
        ("blossom_val/validation/loss_mask", True),
    ],
)
def test_only_losses_are_better_if_lower(tmp_path, metric, lower):
    hook = BestCheckpoint(1, SafeCheckpointer(torch.nn.Linear(1, 1), str(tmp_path)), metric)
    assert hook.lower_is_better is lower


def test_nothing_finite_is_no_best(cfg, caplog):
    cfg.SOLVER.MAX_ITER = 2
    told(cfg, np.nan, np.nan).train()
    assert not Path(cfg.OUTPUT_DIR, "model_best.pth").exists()
    assert "segm/AP nan, none is the best so far" in caplog.text


def test_lower_losses_are_better(cfg):
    cfg.TEST.BEST_METRIC = "validation/total_loss"
    cfg.TEST.VALIDATION_LOSS = True
    cfg.SOLVER.MAX_ITER = 3
    trainer = told(cfg, 1, 1, 1)
    trainer.train()
    losses = [json.loads(line) for line in open(f"{cfg.OUTPUT_DIR}/metrics.json")]
    assert best_of(cfg)["value"] <= losses[-1]["validation/total_loss"]
    assert {"validation/loss_mask", "validation/loss_rpn_cls"} <= losses[-1].keys()


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_best_value_survives_a_resume(cfg, stop):
    """The value before the interruption is the better one, or the evaluation is repeated."""
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    values = [1, 5, 3, 4, 4, 2, 1, 1]
    trainer = told(cfg, *values)
    after_step = trainer.after_step

    def killed():
        after_step()
        if trainer.iter + 1 == stop:
            raise KeyboardInterrupt

    trainer.after_step = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer = told(cfg, *values[stop:])
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == stop
    trainer.train()
    assert best_of(cfg)["value"] == 5 and iterations_of(cfg, "model_best.pth") == 2


def test_another_metric_at_resume_is_said(cfg, caplog):
    cfg.SOLVER.MAX_ITER = 1
    told(cfg, 3).train()
    cfg.SOLVER.MAX_ITER, cfg.TEST.BEST_METRIC = 2, "bbox/AP"
    trainer = told(cfg, 1)
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert "TEST.BEST_METRIC is 'bbox/AP', model_best.json is of 'segm/AP'" in caplog.text
    assert best_of(cfg)["metric"] == "bbox/AP" and best_of(cfg)["value"] == 1


def test_a_metric_that_own_evaluators_do_not_give_is_said(cfg, caplog):
    cfg.TEST.BEST_METRIC, cfg.SOLVER.MAX_ITER = "bbox/AP99", 1

    class Own(Told):
        values: ClassVar = [3]

        @classmethod
        def build_evaluator(cls, cfg, name):
            raise AssertionError("test gives the values")

    Own(cfg).train()
    assert "the evaluation gives no bbox/AP99" in caplog.text and "bbox/AP, segm/AP" in caplog.text


@pytest.mark.parametrize(
    "metric, message",
    [
        ("bbox/APP", "does not give (did you mean bbox/AP?): use one of bbox/AP, bbox/AP50"),
        ("segm/AP-10", "use one of segm/AP, segm/AP50, segm/AP75, segm/APs"),  # digits are 0 to 9
        ("sem_seg/mIoU", "use one of bbox/AP"),
        ("box_proposals/AR@100", "use one of bbox/AP"),
    ],
)
def test_a_metric_that_the_evaluators_do_not_give_is_an_error(cfg, metric, message):
    cfg.TEST.BEST_METRIC = metric
    with pytest.raises(ConfigError) as error:
        Trainer(cfg)
    expected = f"TEST.BEST_METRIC is '{metric}', which the evaluation of 'small_scenes_val'"
    assert str(error.value).startswith(expected) and message in str(error.value)
    assert not Path(cfg.OUTPUT_DIR).exists()
    cfg.TEST.BEST_METRIC = "segm/AP-9"
    Trainer(cfg)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.TEST.BEST_METRIC = "segm/AP"
    with pytest.raises(ConfigError, match="does not give: use one of bbox/AP"):
        check_best_metric(cfg)
    cfg.TEST.BEST_METRIC = "auto"
    check_best_metric(cfg)


def test_early_stopping_and_its_resume(cfg):
    cfg.SOLVER.EARLY_STOPPING_PATIENCE = 2
    trainer = told(cfg, 1, 5, 5, 4)
    assert trainer.train() is None
    assert trainer.iter == 3 and not trainer.values
    assert iterations_of(cfg, "model_best.pth") == 2
    assert iterations_of(cfg, "model_final.pth") == 4
    assert Path(cfg.OUTPUT_DIR, "last_checkpoint").read_text() == "model_final.pth"
    again = told(cfg, 7)
    again.resume_or_load(resume=True)
    again.train()  # evaluates, for the report, and does not train
    assert again._last_eval_results["segm"]["AP"] == 7
    assert iterations_of(cfg, "model_final.pth") == 4
    cfg.SOLVER.EARLY_STOPPING_PATIENCE = 3
    longer = told(cfg, 4, 6, 6, 6)
    longer.resume_or_load(resume=True)
    longer.train()  # one more evaluation without a better value
    assert longer.iter == 4 and best_of(cfg)["value"] == 5


def test_no_early_stop_before_the_first_value(cfg):
    cfg.SOLVER.EARLY_STOPPING_PATIENCE, cfg.SOLVER.MAX_ITER = 1, 4
    trainer = told(cfg, np.nan, np.nan, np.nan, 1)
    trainer.train()
    assert trainer.iter == 4


def test_two_processes_stop_together(tmp_path):
    """Each has statistics and a validation share of its own; the main process decides."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/early_stop_ranks.py"), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=280, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert (
        ranks[0]
        == ranks[1]
        == {"iter": 1, "best": ["validation/total_loss", ranks[0]["best"][1], 1, 2]}
    )
    state = torch.load(tmp_path / "output/model_final.pth", weights_only=False)
    assert state["iteration"] == 1


def random_states():
    return (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("kind", ["mask", "retinanet"])
def test_validation_loss_moves_nothing(cfg, kind):
    for node in NODES[:2]:
        cfg.MODEL[node].NORM = "MABN" if kind == "mask" else "BN"
    if kind == "retinanet":
        cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_ON = "RetinaNet", False
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.NORM = 10, "BRN"
    model = Trainer.build_model(cfg)
    model.backbone.bottom_up.eval()  # a mode of one's own stays too
    loader = build_validation_loader(cfg, "small_scenes_val")
    before = copy.deepcopy(model.state_dict()), random_states()
    modes = {name: module.training for name, module in model.named_modules()}
    attributes = {name: vars(m).keys() for name, m in model.named_modules()}
    normalizer = getattr(model, "loss_normalizer", None)
    with EventStorage() as storage:
        losses = validation_losses(model, loader)
        assert not storage.latest()
    assert losses["total_loss"] == pytest.approx(
        sum(v for k, v in losses.items() if k != "total_loss")
    )
    assert ("loss_mask" in losses) == (kind == "mask") and losses["total_loss"] > 0.05
    for key, value in flat(before[0]).items():
        assert torch.equal(value, flat(model.state_dict())[key]), key
    assert before[1] == random_states()
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert attributes == {name: vars(m).keys() for name, m in model.named_modules()}
    assert normalizer == getattr(model, "loss_normalizer", None)
    assert validation_losses(model, loader) == losses  # equal weights, equal losses


def test_validation_loss_is_that_of_the_running_statistics(cfg):
    model = Trainer.build_model(cfg)
    loader = build_validation_loader(cfg, "small_scenes_val")
    first = validation_losses(model, loader)
    for module in model.modules():
        if hasattr(module, "buffer_x2"):
            module.buffer_x2.fill_(9.0)  # windows have no part in it
    assert validation_losses(model, loader) == first
    model.backbone.bottom_up.stem.conv1.norm.running_var.fill_(100.0)
    assert validation_losses(model, loader) != first


def test_evaluation_leaves_the_training_as_it_is(cfg):
    """With and without validation loss, pictures and best checkpoint: the same weights."""
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 3, 1
    found = []
    for on in (True, False):
        cfg.TEST.VALIDATION_LOSS, cfg.TEST.PICTURES = on, 2 * on
        cfg.TEST.BEST_METRIC = "validation/total_loss" if on else ""
        cfg.OUTPUT_DIR += "x"
        torch.manual_seed(0)
        trainer = Trainer(cfg)
        trainer.train()
        found.append(trainer.model.state_dict())
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


def test_images_without_annotations_have_no_validation_loss(cfg, small_scenes):
    records = [
        {k: v for k, v in r.items() if k != "annotations"}
        for r in DatasetCatalog.get("small_scenes_val")
    ]
    DatasetCatalog.register("unlabelled", lambda: records)
    try:
        assert build_validation_loader(cfg, "unlabelled") is None
    finally:
        DatasetCatalog.remove("unlabelled")


def test_pictures_reach_tensorboard(cfg):
    cfg.TEST.PICTURES, cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 2, 2, 0
    cfg.TEST.BEST_METRIC = ""
    told(cfg, 1).train()
    events = EventAccumulator(cfg.OUTPUT_DIR, size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["predictions/0", "predictions/1"]


@pytest.mark.parametrize(
    "changes, warned",
    [
        ([{}, {"segmentation": None}], False),
        ([{"keypoints": [5, 5, 2]}, {}], False),
        ([{"keypoints": [5, 5, 2]}, {"keypoints": [5, 5, 2, 6, 6, 2]}], False),
        ([{"category_id": 99}, {}], True),  # an error of the drawing ends no training
    ],
)
def test_pictures_of_objects_that_differ(cfg, small_scenes, changes, warned, caplog):
    """The first object has a mask or keypoints, and another one has none."""
    record = copy.deepcopy(DatasetCatalog.get("small_scenes_val")[0])
    for annotation, change in zip(record["annotations"], changes):
        annotation.update(change)
        if annotation["segmentation"] is None:
            del annotation["segmentation"]
    cfg.DATASETS.TEST = ("uneven",)
    DatasetCatalog.register("uneven", lambda: [record])
    MetadataCatalog.get("uneven").thing_classes = list("0123456789")
    try:
        (picture,) = prediction_pictures(cfg, Trainer.build_model(cfg))
    finally:
        DatasetCatalog.remove("uneven")
        MetadataCatalog.remove("uneven")
    assert picture.shape == (640, 320, 3)
    incomplete = f"the picture of {record['file_name']} is incomplete: IndexError"
    assert (incomplete in caplog.text) is warned


def test_report(cfg):
    cfg.SOLVER.MAX_ITER, cfg.TEST.VALIDATION_LOSS = 2, True
    trainer = Trainer(cfg)
    trainer.train()
    text = report_run(trainer)
    assert "small_scenes_val after 2 iterations" in text and "--checkpoint" in text
    assert f"best:     segm/AP {best_of(cfg)['value']:.2f} after" in text
    for name in ("predictions.png", "curves.png"):
        assert Path(cfg.OUTPUT_DIR, name).read_bytes().startswith(b"\x89PNG") and name in text
    assert trainer.model.training


def test_report_is_of_the_weights_that_it_names(cfg, small_scenes):
    cfg.SOLVER.MAX_ITER = 3
    trainer = told(cfg, 12, 34, 23)
    trainer.train()
    last = copy.deepcopy(trainer.model.state_dict())
    drawn = []
    with patch(
        "mabn_d2.engine.report.draw_predictions",
        lambda cfg, model, path: drawn.append(copy.deepcopy(model.state_dict())),
    ):
        text = report_run(trainer)
    final, best = text.split("small_scenes_val after 2 iterations (model_best.pth), in %:")
    assert "small_scenes_val after 3 iterations, in %:" in final
    assert "| box  | 23.0 |" in final and "| box  | 34.0 |" in best
    best = saved(cfg, "model_best.pth")["model"]
    (shown,), now = drawn, trainer.model.state_dict()
    assert all(torch.equal(shown[name], best[name]) for name in best)
    assert all(torch.equal(now[name], last[name]) for name in last)


def test_proposals_alone(cfg):
    """RPN without RoI heads: its proposals are evaluated and drawn, and choose the best checkpoint."""
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_ON = "ProposalNetwork", False
    cfg.SOLVER.MAX_ITER, cfg.TEST.PICTURES = 1, 1
    trainer = Trainer(cfg)
    trainer.train()
    results = trainer._last_eval_results["box_proposals"]
    assert {f"box_proposals/{name}" for name in results} == {
        scalar for scalar in scalars(COCOEvaluator, "small_scenes_val") if "box_proposals" in scalar
    }
    assert best_of(cfg)["metric"] == "box_proposals/AR@1000"
    assert best_of(cfg)["value"] == results["AR@1000"]
    assert "predictions.png" in report_run(trainer)


def test_table_of_classes(small_scenes):
    results = {
        "bbox": {"AP": 50.0, "AP50": 60.0, "AP75": np.nan, "AP-3": 12.345, "AP-0": np.nan},
        "segm": {"AP": 40.0, "AP50": 50.0, "AP75": 30.0, "AP-3": 11.0, "AP-0": 0.0},
    }
    lines = [
        re.sub(" +", " ", line) for line in ap_tables("small_scenes_val", results).splitlines()
    ]
    assert lines[2:] == [
        "| box | 50.0 | 60.0 | - |", "| mask | 40.0 | 50.0 | 30.0 |", "",
        "| class | box AP | mask AP |", lines[6], "| 0 | - | 0.0 |", "| 3 | 12.3 | 11.0 |",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "opts, message",
    [
        (["TEST.BEST_METRIC", "AP"], "TEST.BEST_METRIC is 'AP'"),
        (["TEST.BEST_METRIC", "box/AP"], "TEST.BEST_METRIC is 'box/AP'"),
        (["TEST.BEST_METRIC", "validation/total_loss"], "needs TEST.VALIDATION_LOSS True"),
        (["TEST.BEST_METRIC", "segm/AP", "MODEL.MASK_ON", False], "use bbox/AP"),
        (["TEST.BEST_METRIC", "keypoints/AP"], "MODEL.KEYPOINT_ON is False: use bbox/AP"),
        (["TEST.BEST_METRIC", "x/bbox/AP"], "have no name in front: use bbox/AP"),
        (
            ["TEST.BEST_METRIC", "bbox/AP"]
            + ["DATASETS.TEST", ("small_scenes_val", "small_scenes_train")],
            "have the name of a set in front: use small_scenes_val/bbox/AP",
        ),
        (["SOLVER.EARLY_STOPPING_PATIENCE", -1], "SOLVER.EARLY_STOPPING_PATIENCE is -1"),
        (["SOLVER.EARLY_STOPPING_PATIENCE", 2, "TEST.BEST_METRIC", ""], "which is empty"),
        (
            ["SOLVER.EARLY_STOPPING_PATIENCE", 2, "TEST.EVAL_PERIOD", 0],
            "TEST.EVAL_PERIOD, which is 0",
        ),
        (
            ["SOLVER.EARLY_STOPPING_PATIENCE", 2, "DATASETS.TEST", ()],
            "DATASETS.TEST, which is empty",
        ),
    ],
)
def test_config_errors(cfg, opts, message):
    cfg.merge_from_list(opts)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        check_config(cfg)
    assert "\n" not in str(error.value)


def test_metric_of_one_of_several_sets(cfg):
    cfg.DATASETS.TEST = ("small_scenes_val", "small_scenes_train")
    cfg.TEST.BEST_METRIC = "small_scenes_train/bbox/AP"
    check_config(cfg)


def test_auto_metric(cfg):
    assert best_metric(cfg) == "segm/AP"
    cfg.MODEL.MASK_ON = False
    assert best_metric(cfg) == "bbox/AP"
    for name, metric in (
        ("RetinaNet", "bbox/AP"), ("FCOS", "bbox/AP"), ("Own", "segm/AP"), ("PanopticFPN", "segm/AP"),
        ("ProposalNetwork", "box_proposals/AR@1000"), ("SemanticSegmentor", "sem_seg/mIoU"),
    ):  # fmt: skip
        cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_ON = name, True
        assert best_metric(cfg) == metric
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_ON = "GeneralizedRCNN", False
    cfg.DATASETS.TEST = ("a", "b")
    assert best_metric(cfg) == "a/bbox/AP"
    cfg.DATASETS.TEST = ()
    assert best_metric(cfg) == ""


@pytest.mark.parametrize("seconds, lines", [(0.0, 8), (60.0, 1)])
def test_slow_iterations_are_logged(cfg, seconds, lines, caplog):
    cfg.DATASETS.TEST = ()
    trainer = Trainer(cfg)
    (hook,) = [hook for hook in trainer._hooks if isinstance(hook, LogSlowIterations)]
    hook.seconds = seconds
    trainer.train()
    shown = [text for text in caplog.messages if re.search(r"iter: \d+ +total_loss", text)]
    assert len(shown) == lines
    assert lines == 1 or "eta: " in shown[6]
