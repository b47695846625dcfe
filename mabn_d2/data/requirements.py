"""What a config says about its datasets."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from omegaconf import DictConfig

from ..config_keys import get_key

# Meta-architectures of Detectron2 and the keys of their numbers of classes.
CLASS_KEYS = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}
SEMANTIC = ("PanopticFPN", "SemanticSegmentor")
COCO_KEYPOINTS = 17


class Setting(NamedTuple):
    """A key of the config and its value."""

    key: str
    value: Any

    def __str__(self) -> str:
        return f"{self.key} is {self.value!r}"


@dataclass(frozen=True)
class DataRequirements:
    """What a config says about its datasets; settings that it does not have are None.

    Attributes:
        train, test: names of the datasets; `train.value` is None for an evaluation.
        num_classes: of the boxes.
        num_stuff_classes: of the semantic segmentation.
        ignore_value: label of pixels that a semantic head does not learn.
        masks: whether a model with a mask head is trained.
        reads_masks: whether the loader reads masks, also without a mask head.
        mask_format: "polygon" or "bitmask".
        keypoints, num_keypoints, num_sigmas: of keypoints and their evaluation.
        detections: the most objects that are found in an image.
        filter_empty: whether images without objects are left out.
        skip: whether bad entries are left out of the training sets.
        proposals: pairs of files of proposals and the datasets that they belong to.
        remedies: what to do about "no masks" and about "bitmask".
    """

    train: Setting
    test: Setting
    num_classes: Setting | None
    num_stuff_classes: Setting | None
    ignore_value: Setting
    masks: Setting
    reads_masks: bool
    mask_format: Setting
    keypoints: Setting
    num_keypoints: Setting | None
    num_sigmas: Setting | None
    detections: Setting | None
    filter_empty: Setting
    skip: bool
    proposals: tuple[tuple[Setting, Setting], ...]
    remedies: tuple[tuple[str, str], ...]

    def remedy(self, name: str) -> str:
        """Return what to do about `name`, one of the names in `remedies`."""
        return dict(self.remedies)[name]

    @classmethod
    def from_cfg(cls, cfg: CfgNode, train: bool = True) -> "DataRequirements":
        """Read a config of Detectron2's YAML form.

        Args:
            train: False if the config is used for an evaluation only.
        """
        model = cfg.MODEL
        architecture = model.META_ARCHITECTURE
        class_key = CLASS_KEYS.get(architecture)
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
        train_sets = Setting("DATASETS.TRAIN", tuple(cfg.DATASETS.TRAIN) if train else None)
        test_sets = Setting("DATASETS.TEST", tuple(cfg.DATASETS.TEST))
        proposals = []
        if model.LOAD_PROPOSALS:
            for sets in (train_sets, test_sets) if train else (test_sets,):
                key = sets.key.replace(".", ".PROPOSAL_FILES_")
                proposals.append((Setting(key, tuple(get_key(cfg, key))), sets))
        return cls(
            train=train_sets,
            test=test_sets,
            num_classes=Setting(class_key, get_key(cfg, class_key)) if class_key else None,
            num_stuff_classes=(
                Setting("MODEL.SEM_SEG_HEAD.NUM_CLASSES", model.SEM_SEG_HEAD.NUM_CLASSES)
                if architecture in SEMANTIC
                else None
            ),
            ignore_value=Setting(
                "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", model.SEM_SEG_HEAD.IGNORE_VALUE
            ),
            masks=Setting("MODEL.MASK_ON", model.MASK_ON),
            reads_masks=model.MASK_ON,
            mask_format=Setting("INPUT.MASK_FORMAT", cfg.INPUT.MASK_FORMAT),
            keypoints=Setting("MODEL.KEYPOINT_ON", model.KEYPOINT_ON),
            num_keypoints=Setting(
                "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
            ),
            num_sigmas=Setting("TEST.KEYPOINT_OKS_SIGMAS", len(sigmas) or COCO_KEYPOINTS),
            detections=Setting("TEST.DETECTIONS_PER_IMAGE", cfg.TEST.DETECTIONS_PER_IMAGE),
            filter_empty=Setting(
                "DATALOADER.FILTER_EMPTY_ANNOTATIONS", cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
            ),
            skip=cfg.DATALOADER.get("BAD_INPUT") == "skip",
            proposals=tuple(proposals),
            remedies=(
                ("no masks", "set MODEL.MASK_ON False"),
                ("bitmask", "set INPUT.MASK_FORMAT bitmask"),
            ),
        )

    @classmethod
    def from_lazy(cls, cfg: DictConfig, train: bool = True) -> "DataRequirements":
        """Read a LazyConfig whose datasets come from `get_detection_dataset_dicts`.

        Names of other datasets are not known: they are left to the config's own functions.
        """
        mapper = get_key(cfg, "dataloader.train.mapper")
        heads = get_key(cfg, "model.roi_heads")
        reads_masks = bool(get_key(mapper, "use_instance_mask")) and train
        mask_head = get_key(heads, "mask_head")
        keypoint_head = get_key(heads, "keypoint_head")
        key = "model.num_classes" if heads is None else "model.roi_heads.num_classes"
        names = {}
        for part in ("train", "test") if "evaluator" in cfg.dataloader else ("train",):
            found = get_key(cfg, f"dataloader.{part}.dataset.names")
            names[part] = (found,) if isinstance(found, str) else tuple(found or ())
        mask_key = "dataloader.train.mapper.instance_mask_format"
        return cls(
            train=Setting("dataloader.train.dataset.names", names["train"] if train else None),
            test=Setting("dataloader.test.dataset.names", names.get("test", ())),
            num_classes=_found(cfg, key),
            num_stuff_classes=_found(cfg, "model.sem_seg_head.num_classes"),
            ignore_value=_found(cfg, "model.sem_seg_head.ignore_value")
            or Setting("model.sem_seg_head.ignore_value", -1),
            masks=Setting("model.roi_heads.mask_head", mask_head is not None),
            reads_masks=reads_masks,
            mask_format=Setting(mask_key, get_key(cfg, mask_key) or "polygon"),
            keypoints=Setting("model.roi_heads.keypoint_head", keypoint_head is not None),
            num_keypoints=_found(cfg, "model.roi_heads.keypoint_head.num_keypoints"),
            num_sigmas=None,
            detections=_found(cfg, "model.roi_heads.box_predictor.test_topk_per_image")
            or _found(cfg, "model.max_detections_per_image"),
            skip=get_key(cfg, "train.bad_input") == "skip",
            proposals=(),
            filter_empty=Setting(
                "dataloader.train.dataset.filter_empty",
                get_key(cfg, "dataloader.train.dataset.filter_empty") is not False,
            ),
            remedies=(
                (
                    "no masks",
                    "take mask_head out of model.roi_heads and set "
                    "dataloader.train.mapper.use_instance_mask False",
                ),
                ("bitmask", f'set {mask_key} "bitmask"'),
            ),
        )


def _found(node: Any, key: str) -> Setting | None:
    value = get_key(node, key)
    return None if value is None else Setting(key, value)


def unique(names: Iterable[str]) -> list[str]:
    """Return the names without repetition, in their order."""
    return list(dict.fromkeys(names))


def listed(names: Iterable, shown: int = 10) -> str:
    """Return the names with commas between them; of many, the first ones and how many follow."""
    names = list(map(str, names))
    more = f", ... {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
