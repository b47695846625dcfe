"""One list of classes for all parts of a labelled folder, whatever ids and order each file has."""

from collections import Counter
from pathlib import Path
from typing import Any

from ..coco_parsing import is_text
from ..errors import BadAnnotationError

# Categories that stand for what is no object; tools write them although nothing is labelled so.
BACKGROUND_NAMES = {"_background_", "__background__", "background", "__ignore__"}


def unify_categories(
    files: dict[str, Path], parts: dict[str, dict[str, Any]], class_names: list[str] | None = None
) -> tuple[list[dict[str, Any]], set[str], list[str]]:
    """Give all parts the same categories, in place.

    Classes are those of "train", or of the first part, in the order of their ids; a class that only
    another part has objects of comes behind them. A category without objects is left out if it is
    the supercategory of another (Roboflow's id 0) or named like a background.

    Args:
        files: {part: annotation file}, for messages.
        parts: {part: COCO content}.
        class_names: the names that the classes have to have, in this order.
    Returns:
        (categories with rising ids, names of the parts that were changed, notes).
    Raises:
        BadAnnotationError: if categories are wrong, or not those of `class_names`.
    """
    for key, coco in parts.items():
        _check(files[key], coco)
    used = {
        key: Counter(a["category_id"] for a in coco["annotations"]) for key, coco in parts.items()
    }
    used_entries = {
        (c["id"], c["name"])
        for key, coco in parts.items()
        for c in coco["categories"]
        if used[key][c["id"]]
    }
    groups = {
        (c["id"], c["name"])
        for coco in parts.values()
        for c in coco["categories"]
        if (c["id"], c["name"]) not in used_entries and _is_no_class(c, coco["categories"])
    }
    notes = [
        f"category {id!r} {name!r}, which has no objects and is no class"
        for id, name in sorted(groups, key=str)
    ]
    lists = {
        key: [c for c in coco["categories"] if (c["id"], c["name"]) not in groups]
        for key, coco in parts.items()
    }
    first = lists["train"] if "train" in lists else next(iter(lists.values()))
    if all(isinstance(c["id"], int) for c in first):
        first = sorted(first, key=lambda c: c["id"])
    identities = [{(c["id"], c["name"]) for c in entries} for entries in lists.values()]
    names = [c["name"] for c in first]
    if all(ids == identities[0] for ids in identities) and class_names in (None, names):
        categories = _with_integer_ids(first)
    else:
        for key, entries in lists.items():
            _refuse_equal_names(files[key], entries)
        used_names = {
            key: {c["name"] for c in entries if used[key][c["id"]]}
            for key, entries in lists.items()
        }
        names, more = _order(files, lists, used_names, names, class_names)
        notes += more
        if names == [c["name"] for c in first]:
            categories = _with_integer_ids(first)
        else:
            categories = _numbered(names, first if class_names is None else [])

    changed, same = set(), {(c["id"], c["name"]) for c in categories}
    for key, coco in parts.items():
        if {(c["id"], c["name"]) for c in coco["categories"]} == same:
            continue  # Detectron2 sorts them itself
        changed.add(key)
        if [c["name"] for c in lists[key]] == [c["name"] for c in categories]:
            pairs = zip(lists[key], categories)  # of equal names too
            new_id = {old["id"]: new["id"] for old, new in pairs}
        else:
            by_name = {c["name"]: c["id"] for c in categories}
            new_id = {c["id"]: by_name[c["name"]] for c in lists[key] if c["name"] in by_name}
        for annotation in coco["annotations"]:
            annotation["category_id"] = new_id[annotation["category_id"]]
        coco["categories"] = categories
    return categories, changed, notes


def _check(file: Path, coco: dict[str, Any]) -> None:
    ids = set()
    for category in coco["categories"]:
        id, name = category.get("id"), category.get("name")
        if type(id) not in (int, str) or not is_text(name):
            raise BadAnnotationError(
                f"{file}: a category has the id {id!r} and the name {name!r}: give it an integer and "
                "a text"
            )
        if id in ids:
            raise BadAnnotationError(
                f"{file}: two categories have the id {id!r}: ids must be unique"
            )
        ids.add(id)
    for annotation in coco["annotations"]:
        id = annotation.get("category_id")
        if type(id) not in (int, str) or id not in ids:
            raise BadAnnotationError(
                f"{file}: annotation {annotation.get('id')!r} has the unknown category {id!r}: add it "
                "to categories, or remove the annotation"
            )
    if not coco["categories"]:
        raise BadAnnotationError(
            f"{file} has no categories: label at least one object, then export"
        )


def _is_no_class(category: dict[str, Any], categories: list[dict[str, Any]]) -> bool:
    return category["name"].lower() in BACKGROUND_NAMES or any(
        other.get("supercategory") == category["name"] and other["id"] != category["id"]
        for other in categories
    )


def _with_integer_ids(categories: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if all(isinstance(c["id"], int) for c in categories):
        return categories
    return [{**c, "id": i + 1} for i, c in enumerate(categories)]


def _refuse_equal_names(file: Path, categories: list[dict[str, Any]]) -> None:
    twice = [name for name, n in Counter(c["name"] for c in categories).items() if n > 1]
    if twice:
        raise BadAnnotationError(
            f"{file}: two categories have the name {twice[0]!r}, and the other parts or the "
            "checkpoint have other categories: rename or merge one"
        )


def _order(
    files: dict[str, Path],
    lists: dict[str, list[dict[str, Any]]],
    used_names: dict[str, set[str]],
    names: list[str],
    class_names: list[str] | None,
) -> tuple[list[str], list[str]]:
    """Return (names of the classes in order, notes)."""
    notes = []
    known = names if class_names is None else class_names
    order = list(known)
    for key, entries in lists.items():
        for name in (c["name"] for c in entries):
            if name in order:
                continue
            if name not in used_names[key]:
                notes.append(f"category {name!r} of {files[key]}, which has no objects there")
            elif class_names is not None:
                raise BadAnnotationError(
                    f"{files[key]} has objects of the class {name!r}, which the checkpoint does not "
                    f"know; its classes are {', '.join(class_names)}: rename the class, or start a "
                    "new run on this folder, with MODEL.WEIGHTS the checkpoint"
                )
            else:
                order.append(name)
                notes.append(
                    f"class {name!r} has objects in {files[key]} and is not in the part to train "
                    "on: it can't be learned"
                )
    return order, notes


def _numbered(names: list[str], first: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return categories of these names, with the ids of `first` where it has integers."""
    ids = {c["name"]: c["id"] for c in first if isinstance(c["id"], int)}
    if len(ids) < len(first) or not ids:
        return [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    last, categories = max(ids.values()), []
    for name in names:
        if name not in ids:
            last += 1
        categories.append({"id": ids.get(name, last), "name": name})
    return categories
