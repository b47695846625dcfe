"""The package `mabn_d2`. Detectron2 is on no package index: tools/install_detectron2.py gets it.

Its CPU operators are compiled where torch and a C++ compiler are at hand; the package works without
them, more slowly on a CPU. MABN_D2_NATIVE=0 leaves them out, MABN_D2_NATIVE=1 insists on them.
"""

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version():
    """Read, not imported: an import would need torch before it is installed."""
    text = (ROOT / "mabn_d2" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def native():
    """Return the arguments of setup() that build the operators, or none."""
    wanted = os.environ.get("MABN_D2_NATIVE", "")
    if wanted == "0":
        return {}
    missing = None
    if importlib.util.find_spec("torch") is None:
        missing = "torch (with pip: --no-build-isolation)"
    elif shutil.which(os.environ.get("CXX", "c++")) is None:
        missing = "a C++ compiler"
    if missing:
        if wanted == "1":
            sys.exit(f"mabn_d2: the CPU operators need {missing}")
        print(f"mabn_d2: no CPU operators, for want of {missing}", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension(
        "mabn_d2.layers.ops._native",
        ["mabn_d2/layers/ops/csrc/layer.cpp", "mabn_d2/layers/ops/csrc/ops.cpp"],
        depends=[
            f"mabn_d2/layers/ops/csrc/{name}.h" for name in ("layout", "ops", "passes", "vectors")
        ],
        # Nobody reads the floating-point flags or errno, whose upkeep would forbid vectors.
        extra_compile_args=["-O3", "-fopenmp", "-fno-trapping-math", "-fno-math-errno"],
        extra_link_args=["-fopenmp"],
    )
    build = BuildExtension.with_options(use_ninja=False, no_python_abi_suffix=True)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": build}}


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
    **native(),
    zip_safe=False,
)
