"""The configs that come with this package."""

from pathlib import Path

# In an installed package, and in a checkout.
FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")


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
    known = sorted(str(p.relative_to(f)) for f in FOLDERS for p in f.glob("**/*.yaml"))
    raise FileNotFoundError(f"there is no config {name!r}: use one of {', '.join(known)}")
