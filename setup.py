"""The native extension of `mabn_d2` and its configs; everything else is in pyproject.toml.

The CPU operators are compiled if torch and a C++ compiler are there (with pip: --no-build-isolation).
The package works without them, more slowly on a CPU. MABN_D2_NATIVE=0 leaves them out;
MABN_D2_NATIVE=1 makes their absence an error.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithConfigs(build_py):
    """Copies configs/ into the package. An editable installation reads them from the checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "mabn_d2" / "configs"
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            shutil.copytree(ROOT / "configs", target, ignore=shutil.ignore_patterns("__pycache__"))


def native():
    """Return the extension and the command that builds it, or nothing."""
    wanted = os.environ.get("MABN_D2_NATIVE", "")
    if wanted == "0":
        return [], {}
    missing = None
    if importlib.util.find_spec("torch") is None:
        missing = "torch (with pip: --no-build-isolation)"
    elif shutil.which(os.environ.get("CXX", "c++")) is None:
        missing = "a C++ compiler"
    if missing:
        if wanted == "1":
            sys.exit(f"mabn_d2: the CPU operators need {missing}")
        print(f"mabn_d2: the CPU operators are left out, they need {missing}", file=sys.stderr)
        return [], {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    folder = "mabn_d2/layers/ops/csrc"
    extension = CppExtension(
        "mabn_d2.layers.ops._native",
        sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"{folder}/*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"{folder}/*.h")),
        # Floating-point exceptions and errno are unused; these flags allow vectorization.
        extra_compile_args=["-O3", "-fopenmp", "-fno-trapping-math", "-fno-math-errno"],
        extra_link_args=["-fopenmp"],
    )
    build = BuildExtension.with_options(use_ninja=False, no_python_abi_suffix=True)
    return [extension], {"build_ext": build}


extensions, commands = native()
setup(ext_modules=extensions, cmdclass={"build_py": BuildWithConfigs, **commands})
