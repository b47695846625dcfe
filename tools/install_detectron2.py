#!/usr/bin/env python3
"""Install Detectron2 for the Python that runs this script.

    python tools/install_detectron2.py                 # in the order below; says what it chose and why
    python tools/install_detectron2.py --from source   # the official source or nothing
    python tools/install_detectron2.py --from index    # the copy on the package index or nothing

1. A Detectron2 that already works is left alone (unless `--from` asks for another one).
2. The official source, built against the torch that is installed here.
3. Where that can't be reached or built: the pure Python copy that another distribution on the
   package index carries, pinned by version and sha256 and repacked as an ordinary `detectron2`
   wheel. It lacks only the compiled operators (rotated boxes, deformable convolution, fast COCO
   evaluation).

Needs torch and torchvision installed before. Everything is prepared in a temporary folder, and
only pip changes the environment. Uses the standard library alone.
"""

import argparse
import base64
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SOURCE = "https://github.com/facebookresearch/detectron2.git"

# The distribution that carries Detectron2 whole, as a subpackage of its own.
COPY = "labgym"
COPY_VERSION = "3.1.2"
COPY_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
COPY_PARENT = "LabGym"

# The local label tells the copy from an official build.
VERSION = f"0.6+{COPY}{COPY_VERSION}"
SETUPTOOLS = "setuptools>=70.1,<81"  # Detectron2 imports pkg_resources, which setuptools 81 dropped
REQUIRES = (
    "torch",
    "torchvision",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.2",
    "omegaconf>=2.1,<2.4",
    "hydra-core>=1.1,<2",
    "yacs>=0.1.8",
    "tabulate",
    "termcolor>=1.1",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "matplotlib",
    "pycocotools>=2.0.2",
    "pillow>=7.1",
    "packaging",
    "opencv-python-headless",
    "black",
    SETUPTOOLS,
)


class InstallError(RuntimeError):
    """Why Detectron2 can't be installed, in one line for the user."""


def say(text):
    print(f"detectron2: {text}", flush=True)


def last_line(text):
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no output"


def python(code):
    """Run `code` in a fresh process of this Python: (it worked, last line that it printed)."""
    # The environment hook would import plugins, which may not be installed yet.
    env = {k: v for k, v in os.environ.items() if k != "DETECTRON2_ENV_MODULE"}
    # Not from the current folder: a checkout lying there is not an installation.
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=sys.prefix, env=env, capture_output=True, text=True
    )
    return done.returncode == 0, last_line(done.stderr if done.returncode else done.stdout)


def find_detectron2():
    """(it works, version and place or the reason why not).

    `import detectron2` alone passes on half an installation; the model zoo needs nearly all of it.
    """
    return python(
        "import detectron2, detectron2.model_zoo; print(detectron2.__version__, 'in', detectron2.__path__[0])"
    )


def pip(*arguments, quiet=False):
    command = [sys.executable, "-m", "pip", "--no-input", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=quiet, text=True)
    if done.returncode:
        reason = last_line(done.stderr) if quiet else "its words are above"
        raise InstallError(f"`pip {arguments[0]}` failed ({reason})")


def why_not_source(url=SOURCE, timeout=20):
    """The reason why the official source can't be built here, or None. Bounded in time: an offline
    machine may not refuse the connection but let it hang for minutes."""
    if shutil.which("git") is None:
        return "git is not installed"
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        return "there is no C++ compiler"
    git = subprocess.Popen(
        ["git", "ls-remote", "--exit-code", url, "HEAD"],
        env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # git's own helper processes are ended with it
    )
    try:
        _, error = git.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"{url} does not answer within {timeout} s"
    finally:
        if git.poll() is None:
            os.killpg(git.pid, signal.SIGKILL)
            git.wait()
    return None if git.returncode == 0 else f"{url} can't be reached ({last_line(error)})"


def install_source():
    # No build isolation: the build compiles against the torch that is installed, so what it is
    # built with must be there first.
    pip("install", SETUPTOOLS, "ninja")
    pip("install", "--no-build-isolation", SETUPTOOLS, f"git+{SOURCE}")


def check_sha256(path, expected):
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != expected:
        raise InstallError(f"{path.name} has sha256 {actual}, expected {expected}: not installed")


def repack(copy, folder):
    """Make an ordinary `detectron2` wheel in `folder` of the wheel `copy` that carries Detectron2
    as a subpackage; returns its path. Each file keeps its copyright header."""
    parent, files = f"{COPY_PARENT}/", {}
    with zipfile.ZipFile(copy) as archive:
        for name in archive.namelist():
            if name.startswith(f"{parent}detectron2/") and not name.endswith("/"):
                data = archive.read(name)
                if name.endswith((".py", ".yaml")):
                    # Imports, logger names, resource names: all are spelled with the dotted prefix.
                    data = data.replace(f"{COPY_PARENT}.detectron2".encode(), b"detectron2")
                files[name.removeprefix(parent)] = data
    if "detectron2/__init__.py" not in files:
        raise InstallError(f"{copy.name} does not carry {COPY_PARENT}/detectron2")

    info = f"detectron2-{VERSION}.dist-info"
    metadata = [
        "Metadata-Version: 2.1",
        "Name: detectron2",
        f"Version: {VERSION}",
        "Summary: Detectron2, pure Python, without its compiled operators",
        "Author: FAIR",
        "License: Apache-2.0",
        "Requires-Python: >=3.10",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIRES),
        "",
        f"Copyright (c) Facebook, Inc. and its affiliates. Repacked from {COPY} {COPY_VERSION}; the only",
        f"change to its files is the prefix `{COPY_PARENT}.` taken off the package's name.",
    ]
    wheel = [
        "Wheel-Version: 1.0",
        "Generator: install_detectron2",
        "Root-Is-Purelib: true",
        "Tag: py3-none-any",
    ]
    for name, lines in (
        ("METADATA", metadata),
        ("WHEEL", wheel),
        ("top_level.txt", ["detectron2"]),
    ):
        files[f"{info}/{name}"] = "".join(f"{line}\n" for line in lines).encode()
    record = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(data)}\n")
    files[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()

    target = Path(folder) / f"detectron2-{VERSION}-py3-none-any.whl"
    part = target.with_suffix(".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)  # a fixed date: the same copy gives the same wheel
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, data)
    part.replace(target)  # a wheel under its own name is always whole
    return target


def install_index():
    with tempfile.TemporaryDirectory(prefix="detectron2-") as folder:
        # Its own requirements and Python range are about the rest of it, which is not used.
        only = ("--no-deps", "--ignore-requires-python", "--only-binary=:all:")
        pip("download", "--quiet", *only, "--dest", folder, f"{COPY}=={COPY_VERSION}", quiet=True)
        (copy,) = Path(folder).glob("*.whl")
        check_sha256(copy, COPY_SHA256)
        repack(copy, folder)
        # By name and version: pip then lists it like any other, without this folder's path.
        pip("install", "--find-links", folder, f"detectron2=={VERSION}")


def install(wanted):
    works, found = find_detectron2()
    if works and wanted is None:
        say(f"{found} is already importable: left alone")
        return
    if not works and "No module named 'detectron2'" not in found:
        say(f"there is one that does not work ({found}): installing")

    works, error = python("import torch, torchvision; print(torch.__version__)")
    if not works:
        raise InstallError(
            f"{sys.executable} can't import torch and torchvision ({error}):"
            f" install them first, for example `{sys.executable} -m pip install torch torchvision`"
        )

    obstacle = None
    if wanted != "index":
        obstacle = why_not_source()
        if obstacle is None:
            say(
                f"building the official source {SOURCE} against the torch installed here (some minutes)"
            )
            try:
                install_source()
            except InstallError as e:
                obstacle = f"the official source does not build: {e}"
        if obstacle and wanted == "source":
            raise InstallError(f"{obstacle}; `--from index` takes the copy on the package index")
    if obstacle or wanted == "index":
        say(
            f"taking the copy in {COPY} {COPY_VERSION} on the package index: {obstacle or 'asked for'}"
        )
        install_index()

    works, found = find_detectron2()
    if not works:
        raise InstallError(
            f"installed, but it does not import ({found});"
            f" remove it with `{sys.executable} -m pip uninstall detectron2` and try again"
        )
    say(f"installed {found}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="wanted", choices=("source", "index"), help="take it from here only"
    )
    wanted = parser.parse_args(arguments).wanted
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # as an exit, so that temporary folders go
    try:
        if sys.version_info < (3, 10):  # noqa: UP036 (run by any Python)
            raise InstallError(
                f"Python 3.10 or newer is needed, {sys.executable} is {sys.version.split()[0]}"
            )
        install(wanted)
    except InstallError as error:
        print(f"detectron2: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("detectron2: error: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
