"""The configs that come with this package."""

import os
from pathlib import Path

# In an installed package, and in a checkout.
FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")


def config_names(suffix: str = ".yaml") -> list[str]:
    """Return the configs that come with this package, as paths below `configs/`.

    Args:
        suffix: ".yaml", or ".py" for LazyConfigs.
    """
    return sorted({str(p.relative_to(f)) for f in FOLDERS for p in f.glob(f"**/*{suffix}")})


def get_config_file(name: str) -> str:
    """Return the path of a config that comes with this package.

    Args:
        name: path below `configs/`, such as "mask_rcnn_R50_FPN_mabn_2x.yaml".

    Raises:
        FileNotFoundError: if there is no such config.
    """
    for folder in FOLDERS:
        if (folder / name).is_file():
            return str(folder / name)
    raise FileNotFoundError(f"there is no config {name!r}: use one of {', '.join(config_names())}")


def find_config_file(path: str) -> str:
    """Return the path of a config, which outside of a checkout may be one that comes with this package.

    Args:
        path: of a file, or "configs/..." or the part behind it for a config of this package. A file
            that exists comes first.

    Returns:
        `path` itself if there is neither: its reader says that it does not exist.
    """
    if not os.path.exists(path):
        try:
            return get_config_file(path.removeprefix("configs/"))
        except FileNotFoundError:
            pass
    return path
