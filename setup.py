"""The package `mabn_d2`. Detectron2 is on no package index: tools/install_detectron2.py gets it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version():
    """Read, not imported: an import would need torch before it is installed."""
    text = (ROOT / "mabn_d2" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


EXTRAS = {
    # The digit scenes, COCO evaluation, pictures.
    "data": [
        "matplotlib>=3.6,<4",
        "opencv-python-headless>=4.7,<6",
        "pillow>=9.1",
        "pycocotools>=2.0.6,<3",
        "scikit-learn>=1.2,<2",
        "tqdm>=4.60,<5",
    ],
    "export": [
        "onnx>=1.16,<2",
        "onnxruntime>=1.18,<2",
        "onnxscript>=0.2,<1",
    ],
    "test": [
        "hypothesis>=6.80,<7",
        "pytest>=7.4,<10",
        "pytest-timeout>=2.2,<3",
    ],
}
EXTRAS["all"] = sorted(requirement for extra in EXTRAS.values() for requirement in extra)

setup(
    name="mabn_d2",
    version=version(),
    description="Moving Average Batch Normalization (ICLR 2020) as a Detectron2 plugin",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    packages=find_packages(include=["mabn_d2", "mabn_d2.*"]),
    python_requires=">=3.10",
    install_requires=[
        "numpy>=1.23,<3",
        "torch>=2.4,<3",
        "torchvision>=0.19,<1",
    ],
    extras_require=EXTRAS,
    zip_safe=False,
)
