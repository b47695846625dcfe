"""YAML configs that run no code.

Detectron2 reads a config safely first and, if that fails, by a loader that runs whatever the file's
tags ask for (`!!python/object/apply:os.system`). `check_yaml` comes before it and refuses such files.
"""

import os
from pathlib import Path
from typing import Any

import detectron2
import yaml
from detectron2.utils.file_io import PathManager

BASE = "_BASE_"
_TAG = "tag:yaml.org,2002:"
_PACKAGE = Path(detectron2.__file__).parent
# Code that is installed: RetinaNet's base computes its anchors by a tag. In a checkout of Detectron2
# the configs lie outside of the package, behind a link.
_TRUSTED = (_PACKAGE.resolve(), (_PACKAGE / "model_zoo/configs").resolve())


class RefusedYAML(yaml.YAMLError):
    """A file that asks for more than plain values."""


class _Loader(yaml.SafeLoader):
    """Knows tuples too, which older configs have; they are plain values."""


_Loader.add_constructor(
    f"{_TAG}python/tuple", lambda loader, node: tuple(loader.construct_sequence(node))
)


class _DataLoader(_Loader):
    """Reads what tags of Python mark as the plain value below the tag; nothing is created or run."""


def _plain(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)


_DataLoader.add_multi_constructor(f"{_TAG}python/", _plain)


def load_as_data(filename: str) -> Any:
    """Return what a YAML file holds, with a plain value for every object of Python.

    For the config.yaml that LazyConfig saves, to compare it.
    """
    with PathManager.open(filename) as file:
        return yaml.load(file, _DataLoader)


def check_yaml(filename: str) -> None:
    """Check that a config file and the files of its `_BASE_` hold plain values only.

    Files of the installed Detectron2 are taken as they are.

    Raises:
        RefusedYAML: naming the file and the tag.
        yaml.YAMLError: for a file that is no YAML mapping, or is its own base.
        OSError: for a file that can't be read.
    """
    _check(str(filename), ())


def _check(filename: str, above: tuple[str, ...]) -> None:
    if _is_trusted(filename):
        return
    # Without "." and links, under which a file may be its own base.
    path = filename if "://" in filename else os.path.realpath(filename)
    if path in above:
        raise yaml.YAMLError(f"{filename} is its own {BASE}: correct it")
    content = load_yaml(filename)
    bases = content.get(BASE, [])
    for base in bases if isinstance(bases, list) else [bases]:
        base = os.path.expanduser(str(base))
        if not base.startswith(("/", "https://", "http://")):
            base = os.path.join(os.path.dirname(filename), base)
        if "://" not in base and not PathManager.isfile(base):
            raise yaml.YAMLError(f"{BASE} of {filename} is {base}, which does not exist")
        _check(base, (*above, path))


def load_yaml(filename: str) -> dict[str, Any]:
    """Return the mapping in a YAML file, without its base.

    Raises:
        As `check_yaml`.
    """
    try:
        opened = PathManager.open(filename)
    except OSError as error:  # of a download, which does not name it
        raise OSError(f"{filename} can't be read ({error}): correct its name") from error
    with opened as file:
        try:
            content = yaml.load(file, _Loader)
        except yaml.constructor.ConstructorError as error:
            tag = str(error.problem).partition(_TAG)[2].rstrip("'") or str(error.problem)
            raise RefusedYAML(
                f"{filename} is refused, and nothing of it was run: it has the tag !!{tag}, and a "
                "config needs plain values only; write the value that the tag stands for"
            ) from error
    if not isinstance(content, dict):
        raise yaml.YAMLError(f"{filename} holds no config keys but {type(content).__name__}")
    return content


def _is_trusted(filename: str) -> bool:
    path = Path(filename).resolve()
    return any(path.is_relative_to(root) for root in _TRUSTED)
