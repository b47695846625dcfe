"""What a checkpoint says about its model."""

from detectron2.data import MetadataCatalog

from mabn_d2.checkpoint.description import classes_of, describe_classes


def test_classes_of_datasets():
    """Ids of COCO, of text, and none."""
    for name, ids, expected in (
        ("described_gaps", {3: 0, 90: 1}, [3, 90]),
        ("described_text", {"a": 0, "b": 1}, [1, 2]),
        ("described_none", None, [1, 2]),
    ):
        metadata = MetadataCatalog.get(name).set(thing_classes=["cat", "dog"])
        if ids:
            metadata.set(thing_dataset_id_to_contiguous_id=ids)
        classes = classes_of(describe_classes((name,)))
        assert classes == [
            {"id": id, "name": n} for id, n in zip(expected, ["cat", "dog"], strict=True)
        ]
    assert describe_classes(()) == describe_classes(("described_unknown",)) == {}
    assert classes_of({}) is None
