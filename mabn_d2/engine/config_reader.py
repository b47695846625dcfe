"""A config from its file and the KEY VALUE options of a command line."""

import os
import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from ..config import add_mabn_config
from ..config_files import config_names, find_config_file
from ..config_keys import differences, get_key, leaves
from ..data.errors import did_you_mean, one_line
from ..safe_yaml import RefusedYAML, check_yaml
from .errors import ConfigError

# Keys for which None is a value of its own: no override of WEIGHT_DECAY.
MAY_BE_NONE = ("SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS")

# yacs's message for a value of another type.
_MISMATCH = re.compile(
    r"Type mismatch \(<class '(?P<wanted>\S+)'> vs\. <class '(?P<found>\S+)'>\) "
    r"with values \(.* vs\. (?P<value>.*)\) for config key: (?P<key>\S+)"
)

# Configs that messages give as an example.
_EXAMPLES = {
    ".yaml": "configs/own_data_mask_rcnn_R50_FPN_mabn.yaml",
    ".py": "configs/lazy/mask_rcnn_R50_FPN_mabn_2x.py",
}


def read_config(config_file: str | os.PathLike[str], opts: Sequence[Any] = ()) -> CfgNode:
    """Return the config of a YAML file, changed by `opts`, a list of keys and values.

    Args:
        config_file: outside of a checkout, "configs/..." is that of this package.
        opts: keys and values by turns.
    Raises:
        ConfigError: for a file, key or value that can't be used.
    """
    config_file = find_config_file(os.fspath(config_file))
    cfg = get_cfg()
    add_mabn_config(cfg)
    defaults = cfg.clone()
    check_config_file(config_file, ".yaml")
    check_no_flags(opts)
    _check_pairs(opts, defaults)
    try:
        check_yaml(config_file)
        # Of an address, the copy, which Detectron2 finds to be a file.
        cfg.merge_from_file(PathManager.get_local_path(config_file))
        cfg.merge_from_list(opts)
        # yacs lets None take the place of any value, and then any value that of None: once more,
        # each against its default.
        merged = defaults.clone()
        merged.merge_from_other_cfg(cfg)
    except RefusedYAML as error:
        raise ConfigError(str(error)) from error
    except (AttributeError, KeyError, ValueError, AssertionError, OSError, yaml.YAMLError) as error:
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        text = " ".join(str(said).split())
        if unknown := re.search(r"Non-existent (?:config )?key: (\S+)", text):
            key = unknown[1]
            if key in leaves(defaults):  # where Detectron2 reads a file by the keys of version 1
                raise ConfigError(
                    f"{key} has another name in VERSION 1, which --config-file {config_file} is read as: "
                    f"set VERSION {defaults.VERSION} there"
                ) from error
            raise ConfigError(
                f"{key} is no config key{did_you_mean(key, leaves(defaults))}: correct it in "
                f"--config-file {config_file} or on the command line"
            ) from error
        if mismatch := _MISMATCH.search(text):
            raise ConfigError(_mismatch(defaults, **mismatch.groupdict())) from error
        words = " ".join([f"--config-file {config_file!r}", *map(str, opts)])
        raise ConfigError(f"{words}: {one_line(text, 500)}") from error
    nones = [key for key, _, value in differences(defaults, merged) if value is None]
    if nones := [key for key in nones if key not in MAY_BE_NONE]:
        raise ConfigError(f"{nones[0]} is None: give it a value, or leave it out for the default")
    return merged


def check_config_file(config_file: str, suffix: str) -> None:
    """Raise ConfigError if there is no such file.

    Args:
        suffix: of the configs that may have been meant: ".yaml", or ".py" for LazyConfigs.
    """
    if not config_file:
        raise ConfigError(f"--config-file is missing: name one, such as {_EXAMPLES[suffix]}")
    if "://" not in config_file and not PathManager.isfile(config_file):
        known = did_you_mean(config_file, [f"configs/{name}" for name in config_names(suffix)])
        raise ConfigError(
            f"--config-file is {config_file!r}, which is no file{known}: correct the path"
        )


def check_no_flags(opts: Sequence[Any]) -> None:
    """Raise ConfigError for a flag among the options, which argparse takes as they come."""
    for word in map(str, opts):
        if word.startswith("--"):
            raise ConfigError(f"{word} comes after the first key: put it before the keys")


def _check_pairs(opts: Sequence[Any], defaults: CfgNode) -> None:
    """Raise ConfigError if the options of a command line are no list of keys and values."""
    keys = set(leaves(defaults))
    for key, value in zip_longest(map(str, opts[::2]), opts[1::2]):
        name, equals, after = key.partition("=")
        if equals:
            raise ConfigError(
                f"{key} is one word: write the key and the value as two, {name} {after}"
            )
        if above := next((known for known in keys if key.startswith(f"{known}.")), None):
            raise ConfigError(f"{key} is no config key: {above} is a value, write {above} {value}")
        if len(opts) % 2 and (value is None or str(value) in keys):
            raise ConfigError(f"{key} has no value: write KEY VALUE")


def _mismatch(defaults: CfgNode, wanted: str, found: str, value: str, key: str) -> str:
    """Return what to do about a value of another type than the default's."""
    default = get_key(defaults, key)
    if isinstance(default, CfgNode):
        first = next(leaves(default, f"{key}."))
        return f"{key} is {value}, but it has keys of its own: set one of them, such as {first}"
    example = repr(default)
    if wanted in ("tuple", "list"):
        element = repr(value) if found == "str" else value
        example = f"({element},)" if wanted == "tuple" else f"[{element}]"
    elif (wanted, found) == ("float", "int"):
        example = f"{value}.0"
    return f"{key} is {value} ({found}): use a value of type {wanted}, such as {example}"
