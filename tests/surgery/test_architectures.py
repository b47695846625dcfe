"""Architectures of torchvision, timm, segmentation_models_pytorch and monai: docs/architectures.md is true."""

import pytest

from architectures import FAST, SLOW, TABLE, line, survey, table


def rows():
    text = TABLE.read_text().splitlines()
    return [row for row in text if row.startswith("| ") and "/" in row]


def test_the_table_has_every_architecture():
    listed = [row.split("|")[1].strip() for row in rows()]
    assert listed == FAST + SLOW and len(listed) >= 40
    fields = ("architecture", "norms", "conversion", "folds into conv")
    read = [
        dict(zip(fields, [c.strip() for c in row.split("|")[1:-1]], strict=True)) for row in rows()
    ]
    assert TABLE.read_text() == "\n".join(table(read)) + "\n"
    assert "ERROR" not in TABLE.read_text()
    assert sum("refused" not in row["conversion"] for row in read) >= 40


@pytest.mark.parametrize(
    "architecture", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_architecture(architecture):
    assert line(survey(architecture)) in rows()
