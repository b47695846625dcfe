import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.data.transforms import RandomFlip, ResizeShortestEdge
from detectron2.evaluation import COCOEvaluator

from commands import train
from mabn_d2.data.loader import build_train_loader
from mabn_d2.engine import ConfigError, Trainer, check_config
from mabn_d2.engine.value_check import check_values
from mabn_d2.layers import MABN2d
from nested import flat


@pytest.mark.parametrize("amp", [False, True])
def test_resumed_run_equals_the_straight_one(digits_cfg, tmp_path, amp):
    digits_cfg.SOLVER.AMP.ENABLED = amp
    digits_cfg.SOLVER.CHECKPOINT_PERIOD = 2
    digits_cfg.DATASETS.TEST = ()
    digits_cfg.MODEL.MABN.SIMULATED_BATCH_SIZE = 4  # the window fills before the interruption
    digits_cfg.MODEL.MABN.WARMUP_ITERS = digits_cfg.MODEL.MABN.CLIP_START = 1
    states = []
    for name in ("straight", "resumed"):
        digits_cfg.OUTPUT_DIR = str(tmp_path / name)
        torch.manual_seed(0)  # as default_setup does before the initial weights are drawn
        trainer = Trainer(digits_cfg)
        trainer.resume_or_load(resume=False)
        if name == "resumed":
            trainer.max_iter = 2  # its schedule is that of 4 iterations
            trainer.train()
            assert (tmp_path / name / "last_checkpoint").read_text() == "model_final.pth"
            torch.manual_seed(1)
            trainer = Trainer(digits_cfg)
            trainer.resume_or_load(resume=True)
            assert trainer.start_iter == 2
        trainer.train()
        model = trainer.model.state_dict()
        states.append(flat({"model": model, "trainer": trainer.state_dict()["_trainer"]}))
    straight, resumed = states
    assert straight.keys() == resumed.keys()
    for key, value in straight.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, resumed[key]), key


@pytest.mark.parametrize("images, simulated, window", [(4, 8, 2), (4, 16, 4), (2, 4, 2)])
def test_batch_or_window_changed_at_resume(digits_cfg, images, simulated, window):
    """Windows of another length refill, from the batch's own variance; of the same they go on."""
    digits_cfg.DATASETS.TEST = ()
    digits_cfg.MODEL.MABN.SIMULATED_BATCH_SIZE, digits_cfg.MODEL.MABN.WARMUP_ITERS = 8, 1
    digits_cfg.SOLVER.MAX_ITER = 5
    Trainer(digits_cfg).train()  # 5 iterations of 2 images, m = 4
    digits_cfg.SOLVER.IMS_PER_BATCH, digits_cfg.SOLVER.MAX_ITER = images, 7
    digits_cfg.MODEL.MABN.SIMULATED_BATCH_SIZE = simulated
    trainer = Trainer(digits_cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 5
    norm = trainer.model.backbone.bottom_up.stem.conv1.norm
    saved = torch.load(f"{digits_cfg.OUTPUT_DIR}/model_final.pth", weights_only=False)["model"]
    saved = {name: saved[f"backbone.bottom_up.stem.conv1.norm.{name}"]
             for name in ("running_var", "buffer_x2")}  # fmt: skip
    goes_on = window == 4
    assert norm.window == window and norm.iters == (5 if goes_on else 0)
    assert torch.equal(norm.running_var, saved["running_var"])
    assert torch.equal(norm.buffer_x2, saved["buffer_x2"] if goes_on else torch.zeros(window, 8))
    seen = []
    norm.register_forward_hook(
        lambda layer, x, y: seen.append((x[0].detach().square().mean((0, 2, 3)), layer.last.var))
    )
    trainer.train()
    assert len(seen) == 2 and norm.iters == (7 if goes_on else 2)
    for x2, var in seen:
        assert torch.allclose(x2, var) != goes_on


def test_training_moves_every_layer_and_evaluates(digits_cfg):
    digits_cfg.SOLVER.MAX_ITER = 2
    trainer = Trainer(digits_cfg)
    trainer.train()
    norms = [m for m in trainer.model.modules() if isinstance(m, MABN2d)]
    assert len(norms) == 12 + 8 + 2 + 2 and all(n.iters == 2 for n in norms)
    results = trainer._last_eval_results
    assert np.isfinite([results["bbox"]["AP"], results["segm"]["AP"]]).all()
    lines = [json.loads(line) for line in open(f"{digits_cfg.OUTPUT_DIR}/metrics.json")]
    assert "total_loss" in lines[0] and lines[0]["rejected_batches"] == 0


def test_evaluators(digits_cfg):
    (evaluator,) = Trainer.build_evaluator(digits_cfg, "small_scenes_val")._evaluators
    assert isinstance(evaluator, COCOEvaluator)
    with pytest.raises(ConfigError, match="ade20k_sem_seg_val.*evaluator_type is 'unknown'"):
        MetadataCatalog.get("ade20k_sem_seg_val").__dict__["evaluator_type"] = "unknown"
        Trainer.build_evaluator(digits_cfg, "ade20k_sem_seg_val")
    MetadataCatalog.get("ade20k_sem_seg_val").__dict__["evaluator_type"] = "sem_seg"


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("SOLVER.IMS_PER_BATCH", 3, "SOLVER.IMS_PER_BATCH is 3"),
        ("MODEL.FPN.NORM", "MABM", "MODEL.FPN.NORM: unknown norm 'MABM'"),
        ("MODEL.FPN.NORM", "SyncBN", "MODEL.FPN.NORM is 'SyncBN', which needs GPUs"),
        ("MODEL.ROI_BOX_HEAD.NORM", "nnSyncBN", 'use "naiveSyncBN"'),
        ("MODEL.MABN.BATCH_SIZE", 3, "BATCH_SIZE (3) does not divide"),
        ("DATASETS.TRAIN", ("coco_2107_train",), "names 'coco_2107_train'"),
        ("MODEL.WEIGHTS", "no/such.pth", "MODEL.WEIGHTS is 'no/such.pth'"),
    ],
)
def test_check_config(digits_cfg, key, value, message):
    check_config(digits_cfg, workers=2)
    digits_cfg.merge_from_list([key, value])
    with pytest.raises(ConfigError) as error:
        check_config(digits_cfg, workers=2)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_two_processes_train_resume_and_evaluate(tmp_path):
    """The command of the README with two gloo ranks: 3 iterations, 2 more, evaluation."""
    small = [
        "MODEL.RESNETS.DEPTH",
        10,
        "OUTPUT_DIR",
        tmp_path,
        "SOLVER.CHECKPOINT_PERIOD",
        3,
        "TEST.DETECTIONS_PER_IMAGE",
        5,
    ]
    base = ["--num-gpus", 2, "--dist-url", "auto"]
    first = train(*base, *small, "SOLVER.MAX_ITER", 3, "DATASETS.TEST", "()")
    assert first.returncode == 0, first.stderr[-3000:]
    second = train(*base, "--resume", *small, "SOLVER.MAX_ITER", 5, "DATASETS.TEST", "()")
    assert second.returncode == 0, second.stderr[-3000:]
    assert "Starting training from iteration 3" in second.stdout
    state = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert state["iteration"] == 4
    assert state["model"]["backbone.bottom_up.stem.conv1.norm.iters"].item() == 5
    config = (tmp_path / "config.yaml").read_text()
    third = train(*base, "--resume", "--eval-only", *small, "MODEL.RPN.NMS_THRESH", 0.6)
    assert third.returncode == 0, third.stderr[-3000:]
    assert (tmp_path / "config.yaml").read_text() == config  # what --resume compares with
    assert "copypaste: Task: segm" in third.stdout


def test_the_synchronized_norm_that_the_cpu_takes(tmp_path):
    """What the refusal of SyncBN recommends."""
    norms = [
        item
        for node in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
        for item in (f"MODEL.{node}.NORM", "naiveSyncBN")
    ]
    norms += ["MODEL.BACKBONE.NAME", "build_any_norm_resnet_fpn_backbone"]
    done = train(
        "--num-gpus",
        2,
        "--dist-url",
        "auto",
        "OUTPUT_DIR",
        tmp_path,
        "DATASETS.TEST",
        "()",
        "SOLVER.MAX_ITER",
        2,
        *norms,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = torch.load(tmp_path / "model_final.pth", weights_only=False)["model"]
    assert state["backbone.bottom_up.stem.conv1.norm.running_mean"].any()


def test_test_time_augmentation_and_two_test_sets(digits_cfg, tmp_path):
    """TEST.AUG.ENABLED; each test set writes into a folder of its own."""
    digits_cfg.DATASETS.TEST = ("small_scenes_val", "small_scenes_train")
    digits_cfg.TEST.AUG.ENABLED, digits_cfg.TEST.AUG.MIN_SIZES = True, (96, 144)
    digits_cfg.TEST.DETECTIONS_PER_IMAGE = 2
    model = Trainer.build_model(digits_cfg).eval()
    results = Trainer.test(digits_cfg, model)
    assert not model.training
    folder = tmp_path / "output"
    for name in digits_cfg.DATASETS.TEST:
        assert set(results[name]) == {"bbox", "segm", "bbox_TTA", "segm_TTA"}
        for part in ("inference", "test_time_augmentation/inference"):
            assert (folder / part / name / "coco_instances_results.json").is_file()


@pytest.mark.parametrize(
    "key, value",
    [("META_ARCHITECTURE", "RetinaNet"), ("KEYPOINT_ON", True), ("LOAD_PROPOSALS", True)],
)
def test_test_time_augmentation_of_another_model(digits_cfg, key, value):
    digits_cfg.TEST.AUG.ENABLED, digits_cfg.MODEL[key] = True, value
    with pytest.raises(ConfigError, match=f"TEST.AUG.ENABLED is True, but .*MODEL.{key} {value}"):
        check_values(digits_cfg)


@pytest.mark.parametrize("grouping", [True, False, None])
def test_a_training_loader_of_ones_own(digits_cfg, caplog, grouping):
    """Detectron2's, with and without groups of aspect ratios, and this package's with a mapper."""
    digits_cfg.DATASETS.TEST, digits_cfg.SOLVER.MAX_ITER = (), 1

    class Own(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            augmentations = [RandomFlip(), ResizeShortestEdge(96)]
            mapper = DatasetMapper(cfg, True, augmentations=augmentations)
            if grouping is None:
                return build_train_loader(cfg, mapper)
            return build_detection_train_loader(cfg, mapper=mapper, aspect_ratio_grouping=grouping)

    for max_iter in (1, 2):
        digits_cfg.SOLVER.MAX_ITER = max_iter
        trainer = Own(digits_cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()
        said = "a loader of its own, which starts over" in caplog.text
        assert said == (grouping is not None and max_iter == 2)
    assert grouping is not None or trainer.data_loader.batch_sampler.start == 1
