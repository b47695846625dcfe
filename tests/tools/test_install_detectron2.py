"""tools/install_detectron2.py, offline: pip sees only a folder with a small stand-in for the copy."""

import base64
import csv
import hashlib
import importlib.util
import io
import os
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "install_detectron2.py"
spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

HEADER = "# Copyright (c) Facebook, Inc. and its affiliates.\n"
FILES = {
    "LabGym/__init__.py": "raise ImportError('not part of Detectron2')\n",
    "LabGym/detectron2/__init__.py": HEADER + '__version__ = "0.6"\n',
    "LabGym/detectron2/model_zoo/__init__.py": HEADER
    + "from LabGym.detectron2.layers import NAME\n",
    "LabGym/detectron2/layers/__init__.py": HEADER + 'NAME = "LabGym.detectron2.layers"\n',
    "LabGym/detectron2/model_zoo/configs/a.yaml": "target: LabGym.detectron2.layers.NAME\n",
    "labgym-3.1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: LabGym\nVersion: 3.1.2\n",
    "labgym-3.1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "labgym-3.1.2.dist-info/RECORD": "",
}


@pytest.fixture
def copy(tmp_path):
    path = tmp_path / "labgym-3.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
    return path


def run(*args, **env):
    return subprocess.run(
        [sys.executable, *args], env={**os.environ, **env}, capture_output=True, text=True
    )


def test_repacked_wheel_is_an_ordinary_detectron2(copy, tmp_path):
    wheel = tool.repack(copy, tmp_path)
    assert wheel.name == f"detectron2-{tool.VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    info = f"detectron2-{tool.VERSION}.dist-info"
    expected = {
        name.removeprefix("LabGym/") for name in FILES if name.startswith("LabGym/detectron2/")
    }
    assert {name for name in files if not name.startswith(info)} == expected
    assert not any(b"LabGym.detectron2" in data for data in files.values())
    assert (
        files["detectron2/layers/__init__.py"].decode() == HEADER + 'NAME = "detectron2.layers"\n'
    )
    assert "Requires-Dist: setuptools>=70.1,<81" in files[f"{info}/METADATA"].decode().splitlines()

    record = list(csv.reader(io.StringIO(files[f"{info}/RECORD"].decode())))
    assert sorted(row[0] for row in record) == sorted(files)
    for name, digest, size in record[:-1]:
        expected = (
            base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).decode().rstrip("=")
        )
        assert (digest, int(size)) == (f"sha256={expected}", len(files[name]))

    target = tmp_path / "target"
    done = run("-m", "pip", "install", "--no-index", "--no-deps", "--target", target, wheel)
    assert done.returncode == 0, done.stderr
    code = "import detectron2.model_zoo as z, importlib.metadata as m; print(z.NAME, m.version('detectron2'))"
    assert run("-c", code, PYTHONPATH=str(target)).stdout.split() == [
        "detectron2.layers",
        tool.VERSION,
    ]


def test_wrong_sha256_installs_nothing(copy, tmp_path):
    scratch, target = tmp_path / "scratch", tmp_path / "target"
    scratch.mkdir()
    env = {
        "TMPDIR": str(scratch),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_TARGET": str(target),
    }
    done = run(SCRIPT, "--from", "index", **env)
    assert (done.returncode, target.exists(), list(scratch.glob("detectron2*"))) == (1, False, [])
    (line,) = done.stderr.splitlines()
    assert tool.COPY_SHA256 in line and hashlib.sha256(copy.read_bytes()).hexdigest() in line


def test_importable_one_is_left_alone(tmp_path):
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "7"\n')
    (package / "model_zoo.py").touch()
    done = run(SCRIPT, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"detectron2: 7 in {package} is already importable: left alone\n"


def test_source_that_does_not_answer_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        reason = tool.why_not_source(
            f"https://127.0.0.1:{silent.getsockname()[1]}/x.git", timeout=1
        )
    here = ("does not answer within 1 s", "git is not installed", "there is no C++ compiler")
    assert any(words in reason for words in here)
    assert time.monotonic() - start < 20
