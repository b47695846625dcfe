"""The check of data for LazyConfigs: the keys that its lines name are the LazyConfig's own."""

import pytest
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.evaluation import PascalVOCDetectionEvaluator

from coco_datasets import CLASSES, make_dataset, registered, rle
from mabn_d2.data import DataError
from mabn_d2.engine import ConfigError
from mabn_d2.engine.data_check import check_lazy_data

MODELS = {
    "mask_rcnn_fpn": "model.roi_heads.num_classes",
    "cascade_rcnn": "model.roi_heads.num_classes",
    "retinanet": "model.num_classes",
    "fcos": "model.num_classes",
}


def lazy(model, names):
    cfg = model_zoo.get_config("common/data/coco.py")
    cfg.model = model_zoo.get_config(f"common/models/{model}.py").model
    cfg.dataloader.train.dataset.names = names["train"]
    cfg.dataloader.test.dataset.names = names["val"]
    return cfg


@pytest.fixture
def data(tmp_path):
    return make_dataset(tmp_path)


@pytest.mark.parametrize("model", MODELS)
def test_lazy_config(model, data, tmp_path):
    """The number of classes, for each kind of model."""
    key = MODELS[model]
    with registered(tmp_path, data) as names:
        cfg = lazy(model, names)
        with pytest.raises(DataError, match=f"{key} is 80, but .*dataset.names '{names['train']}'"):
            check_lazy_data(cfg)
        with pytest.raises(DataError, match=f"{key} is 80, but .*dataloader.test.dataset.names"):
            check_lazy_data(cfg, train=False)
        node = cfg.model.roi_heads if "roi_heads" in key else cfg.model
        node.num_classes = 3
        check_lazy_data(cfg)
        check_lazy_data(cfg, train=False)
        loader = instantiate(cfg.dataloader.train.dataset)
        assert len(loader) == 6


def test_best_metric(data, tmp_path):
    with registered(tmp_path, data) as names:
        cfg = lazy("mask_rcnn_fpn", names)
        cfg.model.roi_heads.num_classes = 3
        cfg.train = {"best_metric": "segm/APP"}
        with pytest.raises(ConfigError, match="train.best_metric is 'segm/APP', which the eva"):
            check_lazy_data(cfg)
        check_lazy_data(cfg, train=False)
        for metric in ("segm/APl", f"bbox/AP-{CLASSES[1]}", "validation/total_loss", "auto", ""):
            cfg.train.best_metric = metric
            check_lazy_data(cfg)
        cfg.train.best_metric = "auto"  # of masks, which are not evaluated
        cfg.dataloader.evaluator["_target_"] = PascalVOCDetectionEvaluator
        with pytest.raises(
            ConfigError, match=r"is 'auto' \(segm/AP\), which .* use one of bbox/AP"
        ):
            check_lazy_data(cfg)
        cfg.train.best_metric = "bbox/my_own"
        cfg.dataloader.evaluator = [{"_target_": "builtins.dict"}]  # not known
        check_lazy_data(cfg)


def test_masks_and_classes(data, tmp_path):
    with registered(tmp_path, data) as names:
        cfg = lazy("mask_rcnn_fpn", names)
        cfg.model.roi_heads.num_classes = 3
        check_lazy_data(cfg)
        cfg.model.sem_seg_head = {"num_classes": 54}
        with pytest.raises(
            DataError, match="has no semantic labels .*model.sem_seg_head.num_classes"
        ):
            check_lazy_data(cfg)
    for annotation in data["train"]["annotations"]:
        annotation["segmentation"] = rle(annotation["bbox"])
    with registered(tmp_path, data) as names:
        cfg = lazy("mask_rcnn_fpn", names)
        cfg.model.roi_heads.num_classes = 3
        with pytest.raises(
            DataError, match='set dataloader.train.mapper.instance_mask_format "bitm'
        ):
            check_lazy_data(cfg)
        cfg.dataloader.train.mapper.instance_mask_format = "bitmask"
        check_lazy_data(cfg)
    for annotation in data["train"]["annotations"]:
        annotation["segmentation"] = []
    data["val"]["categories"].reverse()
    for k, category in enumerate(data["val"]["categories"]):
        category["id"] = k + 1
    with registered(tmp_path, data) as names:
        cfg = lazy("mask_rcnn_fpn", names)
        cfg.model.roi_heads.num_classes = 3
        with pytest.raises(DataError, match="their order, from class 0 on"):
            check_lazy_data(cfg)
        del cfg.dataloader.evaluator  # the test set is not used
        with pytest.raises(
            DataError, match="mask_head is True, but .* has no masks: take mask_head out"
        ):
            check_lazy_data(cfg)
        cfg = lazy("retinanet", names)  # reads masks, has no mask head
        del cfg.dataloader.evaluator
        cfg.model.num_classes = 3
        check_lazy_data(cfg)


def test_datasets_that_are_not_known_are_left_alone(data, tmp_path):
    with registered(tmp_path, data) as names:
        cfg = lazy("mask_rcnn_fpn", names)
        cfg.dataloader.train.dataset = {"_target_": "builtins.list"}
        cfg.dataloader.test.dataset = {"_target_": "builtins.list"}
        check_lazy_data(cfg)
        check_lazy_data(cfg, train=False)
