"""The distribution: complete, and at work in a clean environment outside of the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import EntryPoint

import pytest

import mabn_d2
from mabn_d2.commands import train_net
from mabn_d2.config_files import find_config_file
from paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

TRAIN_ONE_STEP = """
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

import mabn_d2
from mabn_d2.layers.ops import cpu_ops

cfg = get_cfg()
mabn_d2.add_mabn_config(cfg)
cfg.merge_from_file(mabn_d2.get_config_file("digits/scratch_mask_rcnn_R18_FPN_mabn.yaml"))
cfg.MODEL.DEVICE = "cpu"
model = build_model(cfg)
optimizer = torch.optim.SGD(model.parameters(), 0.01)
masks = torch.zeros(1, 64, 64, dtype=torch.bool)
masks[0, 8:40, 8:40] = True
truth = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40]])),
                  gt_masks=BitMasks(masks), gt_classes=torch.tensor([3]))
image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
norm = model.backbone.bottom_up.stem.conv1.norm
before = norm.weight.detach().clone()
with EventStorage():
    sum(model([{"image": image, "instances": truth}]).values()).backward()
optimizer.step()
assert norm.weight.isfinite().all() and not torch.equal(norm.weight, before) and norm.iters == 1
print(mabn_d2.__file__)
print("compiled" if cpu_ops.OPERATORS else "torch")
"""


def run(*command, **options):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-3000:])
    return done.stdout


def project():
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Build the source distribution from a copy of the checkout, and unpack it."""
    folder = tmp_path_factory.mktemp("sdist")
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("mabn_d2", "configs"):
        shutil.copytree(ROOT / name, folder / "checkout" / name, ignore=skip)
    for path in [*ROOT.glob("*.*"), ROOT / "LICENSE"]:
        if path.is_file():
            shutil.copy(path, folder / "checkout")
    code = f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=folder / "checkout")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.mark.parametrize("native", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_wheel_trains_in_a_clean_environment(sdist, tmp_path, native):
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MABN_D2"))}
    pip = (sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check")
    run(
        *pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, sdist,
        env={**variables, "MABN_D2_NATIVE": native},
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")

    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin/python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = run(python, "-c", code, env=variables).strip()
    with open(f"{own}/packages_of_the_tests.pth", "w") as file:  # torch, Detectron2
        file.writelines(f"{path}\n" for path in sys.path if path.endswith("-packages"))
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, env=variables)

    home = tmp_path / "elsewhere"
    home.mkdir()
    variables["DETECTRON2_DATASETS"] = str(home)
    place, kernels = run(python, "-c", TRAIN_ONE_STEP, cwd=home, env=variables).splitlines()[-2:]
    assert place.startswith(own)
    assert kernels == ("compiled" if native == "1" else "torch")
    command = [venv / "bin/mabn-train", "--config-file", "configs/mask_rcnn_R50_FPN_mabn_2x.yaml"]
    done = subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True)
    # The config was found, its weights not.
    assert "run mabn-convert imagenet R50-wc.pth" in done.stderr.splitlines()[-1]


def test_source_is_complete(sdist):
    with tarfile.open(f"{sdist}.tar.gz") as archive:
        have = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("mabn_d2/layers/ops/csrc", "configs")
    needed = [path for name in folders for path in (ROOT / name).rglob("*") if path.is_file()]
    needed = {str(path.relative_to(ROOT)) for path in needed if "__pycache__" not in path.parts}
    needed |= {"mabn_d2/py.typed", "LICENSE", "README.md", "setup.py", "pyproject.toml"}
    assert needed <= have
    assert not [name for name in have if name.endswith((".so", ".pyc"))]


def test_wheel_has_configs_and_types(sdist, tmp_path):
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=sdist, env={**os.environ, "MABN_D2_NATIVE": "0"})
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    configs = [path for path in (ROOT / "configs").rglob("*") if path.suffix in (".yaml", ".py")]
    assert {f"mabn_d2/{path.relative_to(ROOT)}" for path in configs} | {"mabn_d2/py.typed"} <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mabn_d2").rglob("*.py")}
    assert modules <= names
    assert not [name for name in names if name.startswith(("tests/", "tools/"))]


@pytest.mark.parametrize("name", sorted(project()["scripts"]))
def test_every_command_can_be_imported(name):
    target = EntryPoint(name, project()["scripts"][name], "console_scripts").load()
    assert callable(target)
    script = ROOT / "tools" / f"{target.__module__.rpartition('.')[2]}.py"
    assert f"from {target.__module__} import main" in script.read_text()


def test_get_config_file():
    path = mabn_d2.get_config_file("mask_rcnn_R50_FPN_mabn_2x.yaml")
    assert os.path.samefile(path, ROOT / "configs/mask_rcnn_R50_FPN_mabn_2x.yaml")
    with pytest.raises(FileNotFoundError, match=r"no config 'nothing.yaml': use one of .*_2x.yaml"):
        mabn_d2.get_config_file("nothing.yaml")


@pytest.mark.parametrize("folder", ["configs/", ""])
def test_commands_find_the_configs_anywhere(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"{folder}digits/scratch_mask_rcnn_R18_FPN_mabn.yaml"
    found = find_config_file(name)
    assert os.path.samefile(found, ROOT / "configs/digits/scratch_mask_rcnn_R18_FPN_mabn.yaml")
    assert train_net.parse_args(["--config-file", name]).config_file == found
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.touch()
    assert find_config_file(name) == name  # a file that is there comes first
    assert find_config_file("nothing.yaml") == "nothing.yaml"


def test_version_is_that_of_the_package():
    done = run(sys.executable, "setup.py", "--version", cwd=ROOT)
    assert done.splitlines()[-1] == mabn_d2.__version__
