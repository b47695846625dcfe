"""What to do about packages that only some datasets need."""

# lvis asks for opencv-python, which overwrites opencv-python-headless; what it imports is there without.
# panopticapi is on no package index.
_COMMANDS = {
    "cv2": "pip install opencv-python-headless",
    "lvis": "pip install --no-deps lvis",
    "panopticapi": "pip install git+https://github.com/cocodataset/panopticapi.git",
}
# What versions of Detectron2 from 2026 import in the place of cityscapesscripts.
INTERNAL = "deeplearning"


def remedy(package: str) -> str:
    """Return what to do about a package that is missing."""
    if package == INTERNAL:
        return "only Meta has it; use a version of Detectron2 that imports cityscapesscripts"
    return f"install it with {_COMMANDS.get(package, f'pip install {package}')}"
