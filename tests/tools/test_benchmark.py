"""tools/benchmark.py runs small and writes what it promises; no time is asserted."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from mabn_d2.benchmark import measure
from mabn_d2.benchmark.run import run_benchmark
from mabn_d2.commands.benchmark import main, parse_args
from mabn_d2.layers import MABN2d
from mabn_d2.layers.naive import NaiveMABN2d
from paths import ROOT
from reference import assert_close

FAST = ["--rounds", "2", "--round-seconds", "0", "--threads", "1"]


def benchmark(*arguments):
    return run_benchmark(parse_args(arguments))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_layer(tmp_path, capsys):
    norms, shapes = ["bn", "bn_relu", "gn", "mabn_relu"], [[1, 4, 3, 5], [2, 6, 2, 2]]
    arguments = ["--norms", "gn,mabn_relu", "--dtype", "fp32,bf16", "--formats", "nchw,nhwc"]
    arguments += ["--shapes", "1x4x3x5,2x6x2x2", "--depth", "2", "--output", f"{tmp_path}/a/b.json"]
    benchmark("layer", *FAST, *arguments)
    report = json.loads((tmp_path / "a/b.json").read_text())
    rows = report["results"]
    cases = [(r["dtype"], r["format"], r["shape"], r["norm"]) for r in rows]
    layouts = [(d, f) for d in ("fp32", "bf16") for f in ("nchw", "nhwc")]
    assert cases == [(d, f, s, n) for d, f in layouts for s in shapes for n in norms]
    assert {(r["elements"], r["depth"], r["threads"]) for r in rows} == {(120, 2, 1), (96, 2, 1)}
    for row in rows:
        assert 0 < row["ms"][0] <= row["ms"][1] <= row["ms"][2] and row["peak_bytes"] > 0
        if row["norm"] in ("bn", "bn_relu"):  # each is its own baseline
            assert row["ratio"] == [1, 1, 1]
    assert set(report) == {"settings", "machine", "versions", "commit", "results"}
    assert report["settings"]["rounds"] == 2 and report["versions"]["torch"] == torch.__version__
    assert (tmp_path / "a/b.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("| mabn_relu |") == 8


def test_inference():
    report = benchmark("inference", *FAST, "--norms", "mabn", "--size", "32", "--batch", "1")
    assert [(r["norm"], r["shape"]) for r in report["results"]] == [
        ("bn", (1, 3, 32, 32)),
        ("mabn", (1, 3, 32, 32)),
    ]


def test_detector():
    arguments = ["--norms", "mabn_folded", "--size", "64", "--batch", "1"]
    report = benchmark("detector", *FAST, *arguments)
    assert [r["norm"] for r in report["results"]] == ["frozen_bn", "mabn_folded"]
    assert report["results"][0]["ratio"] == [1, 1, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["layer", "--norms", "bn,weight"], "norm 'weight' is not available on cpu: bn, bn_relu, "),
        (["layer", "--norms", "syncbn"], "norm 'syncbn' is not available on cpu"),
        (["step", "--norms", "in"], "norm 'in' is not available on cpu: bn, gn, ln, mabn, brn are"),
        (["layer", "--dtype", "fp8"], "'fp8' is none of fp32, bf16, fp16"),
        (["layer", "--clock", "cuda"], "--clock cuda goes with --device cuda"),
        (["layer", "--threads", "1,0"], "--threads [1, 0]: use numbers above 0"),
        (["layer", "--depth", "0"], "--depth [0]: use numbers above 0"),
        (["step", "--batch", "0"], "--batch 0: use numbers above 0"),
        (["accumulation", "--accumulation", "0"], "--accumulation 0: use numbers above 0"),
        (["layer", "--shapes", "2x8x4"], "'2x8x4' is no list of NxCxHxW"),
        (["layer", "--round-seconds", "nan"], "--round-seconds nan: use a number 0 or more"),
        (["layer", "--output", "bm.png"], "--output bm.png: name a JSON file"),
        (["layer", "--output", "."], "--output .: name a JSON file"),
        (
            ["layer", "--output", "file/bm.json"],
            "--output file/bm.json can't be written: Not a dir",
        ),
    ],
)
def test_wrong_arguments(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(SystemExit):
        parse_args(arguments)
    assert message in capsys.readouterr().err


def test_an_error_while_measuring_is_one_line():
    with pytest.raises(SystemExit, match=r"num_channels \(48\) must be divisible"):
        main(["layer", *FAST, "--norms", "gn", "--shapes", "1x48x2x2"])


def test_gpu_check_knows_its_steps():
    def check(*arguments):
        command = ["bash", ROOT / "tools/gpu_check.sh", "-n", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    assert "memcheck" in check("memcheck").stdout
    done = check("tests", "nosuch")
    assert done.returncode == 64 and done.stderr.startswith("gpu_check.sh: no step nosuch; the")


def test_measure_takes_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure.measure(functions, 4, 0, measure.CLOCKS["wall"])
    assert "".join(calls) == "aaabbb" + "ab" * 4
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4}
    summary = measure.summarize([2.0, 6.0, 4.0], [1.0, 2.0, 2.0])
    assert summary == {"ms": [3000, 4000, 5000], "ratio": [2, 2, 2.5]}


def test_memory_peak():
    def three_at_once():
        a = torch.zeros(1000)
        b = a.repeat(4)
        del a
        return b.repeat(2).sum()

    assert 48000 <= measure.memory_peak(three_at_once) < 49000


def test_formula_is_the_layer():
    """The rival that the layer's speed is measured against computes the same."""
    nets = MABN2d(3, clip_start=102), NaiveMABN2d(3, clip_start=102)
    for _ in range(106):
        x, dy = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
        grads = []
        for net in nets:
            inputs = x.clone().requires_grad_()
            y = net(inputs)
            grads.append((y, *torch.autograd.grad(y, (inputs, net.weight, net.bias), dy)))
        for actual, wanted in zip(*grads, strict=True):
            assert_close(actual, wanted, torch.float32)


def test_share_of_the_copy_bandwidth_and_another_baseline():
    arguments = ["--norms", "copy,mabn_split", "--baseline", "mabn", "--shapes", "5x4x3x5"]
    bn, copy, split = benchmark("layer", *FAST, *arguments)["results"]
    assert [bn["norm"], copy["norm"], split["norm"]] == ["mabn", "copy", "mabn_split"]
    assert bn["ratio"] == [1, 1, 1] and "of_copy" not in copy
    assert split["of_copy"] > 0


@pytest.mark.slow
def test_accumulation(tmp_path):
    """Steps of the published 2x config; the memory of micro-batches is that of one."""
    arguments = ["--accumulation", "3", "--size", "160", "--batch", "1"]
    report = benchmark("accumulation", *FAST, *arguments, "--output", f"{tmp_path}/a.json")
    rows = {row["norm"]: row for row in report["results"]}
    assert list(rows) == ["micro", "accumulated", "at_once"]
    assert rows["micro"]["shape"] == (3, 3, 160, 160)
    assert rows["accumulated"]["peak_bytes"] < rows["at_once"]["peak_bytes"]
