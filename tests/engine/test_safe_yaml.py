"""YAML configs run no code: the file itself, its bases, and the config in a checkpoint."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg

from commands import CONFIG, exit_line
from mabn_d2 import CheckpointError
from mabn_d2.checkpoint.description import config_of
from mabn_d2.engine import ConfigError, read_config
from paths import ROOT

ATTACKS = {
    "apply": "!!python/object/apply:os.mkdir [{trap!r}]",
    "new": "!!python/object/new:os.mkdir [{trap!r}]",
    "name": "!!python/name:os.mkdir ''",
    "eval": "!!python/object/apply:eval [\"__import__('os').mkdir({trap!r})\"]",
}


def hostile(folder, attack="apply"):
    value = ATTACKS[attack].format(trap=str(folder / "trap"))
    path = folder / "hostile.yaml"
    path.write_text(f"_BASE_: {ROOT / CONFIG}\nMODEL: {{WEIGHTS: {value}}}\n")
    return path


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("place", ["file", "base", "list of bases"])
def test_hostile_config(attack, place, tmp_path):
    path = hostile(tmp_path, attack)
    if place != "file":
        base = "hostile.yaml" if place == "base" else f"[{ROOT / CONFIG}, hostile.yaml]"
        path = tmp_path / "users.yaml"
        path.write_text(f"_BASE_: {base}\n")
    tag = ATTACKS[attack].split()[0]
    with pytest.raises(
        ConfigError, match="hostile.yaml is refused, and nothing .* was run"
    ) as error:
        read_config(str(path))
    assert tag in str(error.value) and not (tmp_path / "trap").exists()


@pytest.mark.parametrize("command", [
    ["train_net.py", "--num-gpus", 0], ["demo.py", "--num-gpus", 0], ["compare_norms.py"],
    ["convert_weights.py", "fold", "a.pth", "b.pth"],
])  # fmt: skip
def test_hostile_config_of_commands(command, tmp_path, monkeypatch):
    path = hostile(tmp_path)
    (tmp_path / "a.pth").touch()
    tool, *arguments = [tmp_path / a if str(a).endswith(".pth") else a for a in command]
    if tool == "compare_norms.py":
        arguments = ["--output", tmp_path / "output"]
    if tool == "convert_weights.py":
        torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "a.pth")
        arguments = [arguments[0], "--config-file", path, *arguments[1:]]
    else:
        arguments += ["--config-file", path]
    line = exit_line(monkeypatch, tool, *arguments)
    assert "is refused" in line and not (tmp_path / "trap").exists()


def test_detectron2_itself_runs_it(tmp_path):
    """Which is what this is for."""
    with pytest.raises(Exception):  # noqa: B017 (what the trap leaves is no path)
        get_cfg().merge_from_file(str(hostile(tmp_path)))
    assert (tmp_path / "trap").exists()


def test_hostile_config_in_a_checkpoint(tmp_path):
    text = f"MODEL: {{WEIGHTS: {ATTACKS['apply'].format(trap=str(tmp_path / 'trap'))}}}"
    with pytest.raises(CheckpointError, match="os.mkdir"):
        config_of({"config": text})
    assert not (tmp_path / "trap").exists()


def test_configs_and_bases_with_an_address(tmp_path, monkeypatch):
    """Of a server: a base, a config with a base beside it, and what it does not have."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    served = tmp_path / "served"
    served.mkdir()
    hostile(served).rename(served / "hostile.yaml")
    (served / "base.yaml").write_text(f"_BASE_: {ROOT / CONFIG}\nSOLVER: {{MAX_ITER: 7}}\n")
    (served / "users.yaml").write_text("_BASE_: base.yaml\nSEED: 3\n")
    handler = partial(SimpleHTTPRequestHandler, directory=served)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            path = tmp_path / "a.yaml"
            path.write_text(f"_BASE_: {address}/base.yaml\nSEED: 3\n")
            for file in (path, f"{address}/users.yaml"):
                cfg = read_config(file)
                assert (cfg.SOLVER.MAX_ITER, cfg.SEED) == (7, 3)
            path.write_text(f"_BASE_: {address}/hostile.yaml\n")
            with pytest.raises(ConfigError, match="hostile.yaml is refused, and nothing"):
                read_config(path)
            path.write_text(f"_BASE_: {address}/no.yaml\n")
            for file in (path, f"{address}/no.yaml"):
                with pytest.raises(ConfigError, match=f"{address}/no.yaml can't be read .*404"):
                    read_config(file)
        finally:
            server.shutdown()


def test_what_is_plain_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        f"_BASE_: {ROOT / CONFIG}\nSOLVER: {{STEPS: !!python/tuple [1, 2], BASE_LR: 1.0e-3}}\n"
    )
    cfg = read_config(str(path))
    assert cfg.SOLVER.STEPS == (1, 2) and cfg.SOLVER.BASE_LR == 1e-3
    assert read_config(ROOT / CONFIG).SOLVER.OPTIMIZER == "ADAMW"


def test_another_version_than_the_base(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"_BASE_: {ROOT / CONFIG}\nVERSION: 1\n")
    with pytest.raises(ConfigError, match="has another name in VERSION 1, .*set VERSION 2 there"):
        read_config(str(path))


def test_configs_of_detectron2(tmp_path):
    """RetinaNet's base computes its anchors by a tag; it is installed code, as Detectron2 is."""
    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    path = tmp_path / "a.yaml"
    path.write_text(f"_BASE_: {model_zoo.get_config_file(name)}\n")
    cfg = read_config(str(path))
    assert (
        cfg.MODEL.ANCHOR_GENERATOR.SIZES == model_zoo.get_config(name).MODEL.ANCHOR_GENERATOR.SIZES
    )


@pytest.mark.parametrize("text, message", [
    ("", "holds no config keys but NoneType"),
    ("- 1", "holds no config keys but list"),
    ("_BASE_: a.yaml", "is its own _BASE_"),
    ("_BASE_: ./a.yaml", "is its own _BASE_"),
    ("_BASE_: ../../a.yaml", "does not exist"),
    ("_BASE_: no.yaml", "no.yaml, which does not exist"),
    ("MODEL: {RESNETS: {DEPHT: 50}}", r"MODEL.RESNETS.DEPHT is no config key \(did you mean MODEL.RESNETS.DEPTH"),
    ("MODEL: [", "while parsing"),
])  # fmt: skip
def test_files_that_are_no_config(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_config(str(tmp_path / "a.yaml"))
    assert "\n" not in str(error.value)
