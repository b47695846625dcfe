"""What is found in a COCO file: problems, changes that mend them, notes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .dataset_summary import DatasetSummary
from .errors import BadAnnotationError

SHOWN = 5  # problems named in a message


class Problem(NamedTuple):
    """What is wrong with one entry, which can be left out."""

    key: str  # "images" or "annotations"
    id: int | str
    text: str
    position: int = -1  # in the list of that key

    def __str__(self) -> str:
        return self.text


class Edit(NamedTuple):
    """A change to one entry of the parsed file."""

    key: str  # "images" or "annotations"
    position: int
    field: str | None  # None: leave the entry out
    value: Any = None


@dataclass
class Findings:
    """The result of `inspect`.

    Attributes:
        problems: entries that can't be used.
        edits: changes with which the rest can be used.
        notes: one line for each kind of thing that is doubtful, with counts.
    """

    summary: DatasetSummary
    problems: list[Problem] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def refuse(problems: list[Problem], where: str, remedy: str, what: str = "the file") -> None:
    """Raise BadAnnotationError if there are problems in `where`; `what` is to be corrected."""
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise BadAnnotationError(
            f"{where}: {'; '.join(map(str, problems[:SHOWN]))}{more}. Correct {what}, {remedy}"
        )


def apply_edits(content: dict, edits: Iterable[Edit]) -> None:
    """Change the content of a COCO file in place."""
    dropped: dict[str, set[int]] = {"images": set(), "annotations": set()}
    for edit in edits:
        if edit.field is None:
            dropped[edit.key].add(edit.position)
        else:
            content[edit.key][edit.position][edit.field] = edit.value
    for key, positions in dropped.items():
        if positions:
            content[key] = [e for i, e in enumerate(content[key]) if i not in positions]
    if dropped["images"]:
        images = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in images]


def problems_by_kind(problems: list[Problem]) -> Iterator[str]:
    """Yield a line for the problems with images and one for those with annotations."""
    for key in ("images", "annotations"):
        found = [problem for problem in problems if problem.key == key]
        if found:
            more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            yield f"{len(found)} {key} are left out: {'; '.join(map(str, found[:SHOWN]))}{more}"
