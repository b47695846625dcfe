"""Compares datasets with a config, and with each other."""

from typing import NoReturn

from detectron2.data import MetadataCatalog

from .dataset_summary import DatasetSummary
from .errors import DataError
from .requirements import DataRequirements, Setting, listed, unique


def compare(wanted: DataRequirements, summaries: dict[str, DatasetSummary]) -> list[str]:
    """Return warnings.

    Args:
        wanted: what the config says.
        summaries: what the datasets hold, by name; those that are not known are not compared.
    Raises:
        DataError: if they contradict each other.
    """
    return _Comparison(wanted, summaries).notes


class _Comparison:
    def __init__(self, wanted: DataRequirements, summaries: dict[str, DatasetSummary]) -> None:
        self.wanted = wanted
        self.notes: list[str] = []
        self.train = self._known(wanted.train, summaries)
        self.test = self._known(wanted.test, summaries)
        self.check_objects()
        self.check_sets()
        self.check_images()
        self.check_detections()
        self.check_number_of_classes()
        self.check_stuff_classes()
        self.check_masks()
        self.check_mask_format()
        if wanted.keypoints.value:
            self.check_keypoints()

    @staticmethod
    def _known(setting: Setting, summaries: dict[str, DatasetSummary]) -> dict[str, DatasetSummary]:
        names = unique(setting.value or ())
        return {name: summaries[name] for name in names if name in summaries}

    def check_objects(self) -> None:
        """There is something to learn and to evaluate."""
        for name, summary in self.test.items():
            if not summary.annotated:
                if summary.classes is not None:
                    self.notes.append(
                        f"{name} ({summary.source}) has no annotations: results are written, but no AP"
                    )
            elif not summary.objects_with_area:
                raise DataError(
                    f"{self.wanted.test.key} names {name!r}, which has {_no_objects(summary)}: there "
                    f"is nothing to evaluate; correct {summary.source}, or leave {name!r} out"
                )
        annotated = {name: summary for name, summary in self.train.items() if summary.annotated}
        bare = [(name, summary) for name, summary in self.train.items() if not summary.annotated]
        if self.wanted.num_classes and bare:
            name, summary = bare[0]
            raise DataError(
                f"{self.wanted.train.key} names {name!r}, which has no annotations of objects: there "
                f"is nothing to learn; add them to {summary.source}"
            )
        empty = {name: s for name, s in annotated.items() if not s.objects_with_area}
        for name, summary in empty.items():
            if len(empty) == len(annotated):
                raise DataError(
                    f"{self.wanted.train.key} names {name!r}, which has {_no_objects(summary)}: there "
                    f"is nothing to learn; correct {summary.source}"
                )
            if self.wanted.filter_empty.value:
                self.notes.append(
                    f"{name} ({summary.source}) has {_no_objects(summary)}, and "
                    f"{self.wanted.filter_empty}: none of its images is used"
                )

    def check_sets(self) -> None:
        """All sets have the classes of the first training set, in its order."""
        train = {n: s.classes for n, s in self.train.items() if s.classes is not None}
        if not (self.wanted.num_classes and train):
            return
        (first, classes), *others = train.items()
        remedy = "give both the same categories, in the same order of ids"
        for name, second in others:
            if second != classes:
                raise DataError(
                    f"{self.wanted.train.key} names {first!r} and {name!r}, whose classes differ in "
                    f"{_difference(classes, second, first, name)}: {remedy}"
                )
        for name, summary in self.test.items():
            other = summary.classes
            if other is None:
                continue
            if other[: len(classes)] != classes:
                raise DataError(
                    f"{self.wanted.test.key} {name!r} has other classes than {self.wanted.train.key} "
                    f"{first!r}: they differ in {_difference(classes, other, first, name)}: {remedy}"
                )
            if more := other[len(classes) :]:
                self.notes.append(
                    f"{len(more)} classes are only in {self.wanted.test.key} {name!r}, and are not "
                    f"learned: {listed(more)}"
                )

    def check_images(self) -> None:
        """Images that a model was trained on tell nothing about it."""
        for train, trained in self.train.items():
            for test, tested in self.test.items():
                if train == test or not (shared := trained.files & tested.files):
                    continue
                self.notes.append(
                    f"{len(shared)} of {len(tested.files)} images of {self.wanted.test.key} {test!r} "
                    f"are also in {self.wanted.train.key} {train!r}, such as {min(shared)}: the AP will "
                    "be too high; take them out of one"
                )

    def check_detections(self) -> None:
        """As many objects are found in an image as it has."""
        setting = self.wanted.detections
        if setting is None:
            return
        for name, summary in self.test.items():
            crowded = {n: k for n, k in summary.objects_per_image.items() if n > setting.value}
            if crowded:
                self.notes.append(
                    f"{setting}, but {sum(crowded.values())} of {summary.images} images of "
                    f"{self.wanted.test.key} {name!r} have more objects, up to {max(crowded)}: the rest "
                    f"is not found; set {setting.key} {max(crowded)} or more"
                )

    def check_number_of_classes(self) -> None:
        """The model has as many classes as the datasets."""
        setting = self.wanted.num_classes
        if setting is None:
            return
        evaluation = self.wanted.train.value is None
        sets = self.wanted.test if evaluation else self.wanted.train
        for name, summary in (self.test if evaluation else self.train).items():
            where = f"{summary.source} ({sets.key} {name!r})"
            if summary.classes is None:
                largest = max((i for i in summary.class_ids if isinstance(i, int)), default=-1)
                if largest >= setting.value:
                    raise DataError(
                        f"{setting}, but {where} has objects with category_id {largest}: set "
                        f"{setting.key} {largest + 1}, or correct the category_id"
                    )
                continue
            count = len(summary.classes)
            if evaluation and count > setting.value:
                unknown = listed(summary.classes[setting.value :])
                self.notes.append(
                    f"{setting}, but {where} has {count} classes: the model can't find {unknown}"
                )
            elif count != setting.value and summary.annotated:
                raise DataError(
                    f"{setting}, but {where} has {count} categories ({listed(summary.classes)}): set "
                    f"{setting.key} {count}"
                )

    def check_stuff_classes(self) -> None:
        """A semantic head has as many classes as the datasets."""
        setting = self.wanted.num_stuff_classes
        if setting is None:
            return
        for sets in (self.wanted.train, self.wanted.test):
            for name in unique(sets.value or ()):
                stuff = MetadataCatalog.get(name).get("stuff_classes")
                if stuff is not None and len(stuff) != setting.value:
                    raise DataError(
                        f"{setting}, but {name!r} ({sets.key}) has {len(stuff)} stuff_classes "
                        f"({listed(stuff)}): set {setting.key} {len(stuff)}"
                    )

    def check_masks(self) -> None:
        """Every object has a mask if the model learns masks."""
        masks = self.wanted.masks
        for name, summary in self.train.items():
            lacking = summary.objects - summary.objects_with_mask
            if lacking and masks.value:
                self._refuse_masks(masks, self.wanted.train.key, name, summary, lacking)
            elif lacking and summary.objects_with_mask and self.wanted.reads_masks:
                setting = Setting("dataloader.train.mapper.use_instance_mask", True)
                self._refuse_masks(setting, self.wanted.train.key, name, summary, lacking)
        for name, summary in self.test.items() if masks.value else ():
            lacking = summary.objects - summary.objects_with_mask + summary.crowds_without_mask
            # That of Pascal VOC evaluates boxes alone.
            if lacking and MetadataCatalog.get(name).get("evaluator_type") != "pascal_voc":
                self._refuse_masks(masks, self.wanted.test.key, name, summary, lacking)

    def _refuse_masks(
        self, setting: Setting, key: str, name: str, summary: DatasetSummary, lacking: int
    ) -> NoReturn:
        where = f"{summary.source} ({key} {name!r})"
        if not summary.objects_with_mask:
            what = f"{where} has no masks"
        else:
            first = f", the first: {summary.no_mask}" if summary.no_mask else ""
            count = summary.objects + summary.crowds
            what = f"{lacking} of {count} annotations of {where} have no mask{first}"
        raise DataError(
            f"{setting}, but {what}: {self.wanted.remedy('no masks')}, or add the masks"
        )

    def check_mask_format(self) -> None:
        if not self.wanted.reads_masks or self.wanted.mask_format.value != "polygon":
            return
        for name, summary in self.train.items():
            if summary.objects_with_rle:
                raise DataError(
                    f"{self.wanted.mask_format}, but {summary.objects_with_rle} of {summary.objects} "
                    f"objects of {summary.source} ({self.wanted.train.key} {name!r}) have RLE masks, "
                    f"the first: {summary.rle}: {self.wanted.remedy('bitmask')}"
                )

    def check_keypoints(self) -> None:
        for sets, summaries in ((self.wanted.train, self.train), (self.wanted.test, self.test)):
            for name, summary in summaries.items():
                where = f"{summary.source} ({sets.key} {name!r})"
                self._check_keypoints_of(summary, where)
                sigmas = self.wanted.num_sigmas
                if sigmas is None or sets is self.wanted.train:
                    continue
                numbers = [n for n in summary.keypoint_counts if n != sigmas.value]
                if numbers:
                    raise DataError(
                        f"{sigmas.key} has {sigmas.value} numbers, but objects of {where} have "
                        f"{numbers[0]} keypoints: set one number for each keypoint"
                    )
        for name in self.train:
            metadata = MetadataCatalog.get(name)
            for attribute in ("keypoint_names", "keypoint_flip_map"):
                if metadata.get(attribute) is None:
                    raise DataError(
                        f"{self.wanted.keypoints}, but {name!r} ({self.wanted.train.key}) has no "
                        f"{attribute}: set it with MetadataCatalog.get({name!r}).set({attribute}=...)"
                    )

    def _check_keypoints_of(self, summary: DatasetSummary, where: str) -> None:
        lacking = summary.objects - summary.objects_with_keypoints
        if lacking:
            raise DataError(
                f"{self.wanted.keypoints}, but {lacking} of {summary.objects} objects of {where} have "
                f"no keypoints, the first: {summary.no_keypoints}: add them, or train without keypoints"
            )
        setting = self.wanted.num_keypoints
        for number in summary.keypoint_counts:
            if setting and number != setting.value:
                raise DataError(
                    f"{setting}, but objects of {where} have {number} keypoints: set {setting.key} "
                    f"{number}"
                )


def _no_objects(summary: DatasetSummary) -> str:
    if summary.crowds:
        return f"no objects (all {summary.crowds} annotations are iscrowd)"
    if summary.objects:
        return f"no objects but {summary.objects} whose box has no area inside the image"
    return "no objects"


def _difference(first: list[str], second: list[str], first_name: str, second_name: str) -> str:
    """Return text that shows how two lists of classes differ."""
    if sorted(first) == sorted(second):
        i = next(i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
        return (
            f"their order, from class {i} on ({listed(first[i:])} in {first_name!r}, "
            f"{listed(second[i:])} in {second_name!r})"
        )
    parts = []
    for names, others, where in ((first, second, first_name), (second, first, second_name)):
        if only := [name for name in names if name not in others]:
            parts.append(f"{listed(only)}, only in {where!r}")
    return "; ".join(parts) or f"{len(first)} and {len(second)} entries"
