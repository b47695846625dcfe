"""How to install packages that only some datasets need."""

# lvis asks for opencv-python, which overwrites opencv-python-headless; what it imports is there without.
# panopticapi is on no package index.
_COMMANDS = {
    "cv2": "pip install opencv-python-headless",
    "lvis": "pip install --no-deps lvis",
    "panopticapi": "pip install git+https://github.com/cocodataset/panopticapi.git",
}


def install_command(package: str) -> str:
    """Return the command that installs a package."""
    return _COMMANDS.get(package, f"pip install {package}")
