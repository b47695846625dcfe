"""The sweep: runs side by side, repeats none, mixes no settings, loses no row, draws."""

import csv
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from classifying import ENVIRONMENT, make_data
from commands import slurm_variables
from mabn_d2.classification.sweep import missing_runs, read_rows, training_args
from mabn_d2.classification.sweep_report import table
from mabn_d2.commands.sweep_batch_size import main
from paths import ROOT

SMALL = (
    "--arch small --crop 32 --val-resize 32 --batch-size 8 --epochs 1 --epoch-iters 3 --workers 0 "
    "--device cpu --lr 0.02"
).split()
TWO = ("--sizes", "2", "8", "--seeds", "0", "--jobs", "2", "--norms", "bn", "gn", "mabn")
COMMITTED = ROOT / "results/batch_size/sweep.csv"


@pytest.fixture
def folder(tmp_path):
    """A working folder that has the committed results and data."""
    (tmp_path / "results/batch_size").mkdir(parents=True)
    (tmp_path / "results/batch_size/sweep.csv").write_bytes(COMMITTED.read_bytes())
    make_data(tmp_path)
    return tmp_path


def start(folder, *arguments):
    command = [sys.executable, ROOT / "tools/sweep_batch_size.py", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=ENVIRONMENT,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def sweep(folder, *more, sizes=TWO):
    process = start(folder, "--data", "crops", *sizes, "--", *SMALL, *more)
    out, errors = process.communicate(timeout=200)
    return process.returncode, out, errors


def read(folder):
    text = (folder / "results/batch_size_crops/sweep.csv").read_text()
    return text, list(csv.DictReader(text.splitlines()))


@pytest.mark.parametrize(
    "launched, message",
    [
        (False, r"sklearn.*pip install 'mabn_d2\[data\]'"),
        (True, "srun starts 2 processes, each of which would train the whole sweep: start one"),
    ],
)
def test_what_a_sweep_lacks(tmp_path, monkeypatch, launched, message):
    """The package whose digits the digit crops are made of, or a process of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for name, value in slurm_variables(0, 1).items() if launched else ():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match=message):
        main(["--output", "out"])
    signal.signal(signal.SIGTERM, before)
    assert not Path("datasets/digit_crops").exists()


def test_runs_once_and_draws(folder):
    code, _, errors = sweep(folder)
    assert code == 0, errors
    text, rows = read(folder)
    found = sorted((row["norm"], row["norm_batch"]) for row in rows)
    assert found == [("bn", "2"), ("bn", "8"), ("gn", "2"), ("mabn", "2"), ("mabn", "8")]
    for row in rows:
        assert 0 <= float(row["top1_error"]) <= 100 and float(row["minutes"]) >= 0
        assert (
            row["device"] == "cpu" and row["torch"] and row["settings"].startswith("--data crops ")
        )
    picture = folder / "results/batch_size_crops/sweep.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (folder / "results/batch_size/sweep.csv").read_bytes() == COMMITTED.read_bytes()

    picture.unlink()
    code, out, _ = sweep(folder)
    assert code == 0 and picture.exists() and "top1_error" not in out and read(folder)[0] == text

    code, _, errors = sweep(folder, "--weight-decay", "0.1")
    assert code == 1 and "of other settings: name another --output" in errors
    assert read(folder)[0] == text


def test_no_run_is_made_twice_and_settings_are_not_mixed():
    def missing(rest, seeds, norms, rows=()):
        args = Namespace(
            data="crops", sizes=[8, 2, 8], seeds=seeds, norms=norms, rest=rest, runs=Path("runs")
        )
        return missing_runs(args, rows, Path("sweep.csv"))

    runs = missing(SMALL, [0], ["gn", "syncbn", "mabn"])
    assert [run[2:] for run in runs] == [
        ("gn", 8, 0),
        ("syncbn", 8, 0),
        ("mabn", 8, 0),
        ("mabn", 2, 0),
    ]
    done = {
        "norm": "gn",
        "norm_batch": "2",
        "seed": "0",
        "settings": f"--data crops {' '.join(SMALL)}",
    }
    assert not missing(SMALL, [0], ["gn"], [done])
    for norms in (["gn"], ["mabn"]):
        with pytest.raises(ValueError, match="sweep.csv has gn 2 of other settings"):
            missing([*SMALL, "--epochs", "2"], [1], norms, [done])
    with pytest.raises(SystemExit):  # no batch of 8 can be made of 4 images
        missing([*SMALL, "--batch-size", "4"], [0], ["mabn"])


def test_a_failed_run_loses_no_other(folder):
    """A file is in the place of its folder; the next sweep would repeat only that run."""
    sizes = ("--sizes", "2", "--seeds", "0", "--jobs", "1", "--norms", "mabn", "bn")
    runs = folder / "results/batch_size_crops/runs"
    runs.mkdir(parents=True)
    place = training_args(["--data", "crops", *SMALL], runs, "mabn", 2, 0).output
    Path(place).touch()
    code, _, errors = sweep(folder, sizes=sizes)
    assert code == 1 and "1 runs failed" in errors and "mabn 2 seed 0: --output" in errors
    assert "Traceback" not in errors
    found = [(row["norm"], row["norm_batch"]) for row in read(folder)[1]]
    assert found == [("bn", "2")]


def test_a_stopped_sweep_goes_on(folder):
    sizes = ("--sizes", "2", "--seeds", "0", "1", "--jobs", "1", "--norms", "gn")
    more = ("--epochs", "2", "--epoch-iters", "100", "--log-period", "1")
    process = start(folder, "--data", "crops", *sizes, "--", *SMALL, *more)
    runs = folder / "results/batch_size_crops/runs"
    end = time.monotonic() + 120
    while not list(runs.glob("gn_2_seed0_*/log.json")) and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    (checkpoint,) = runs.glob("*/checkpoint.pth")  # of the first run; the second one did not begin
    assert not (folder / "results/batch_size_crops/sweep.csv").exists()
    code, _, errors = sweep(folder, *more, sizes=sizes)
    assert code == 0, errors
    rows = read(folder)[1]
    assert [row["seed"] for row in rows] == ["0", "1"]
    assert rows[0]["minutes"] == "" and float(rows[1]["minutes"]) > 0
    log = (checkpoint.parent / "log.json").read_text().splitlines()
    assert len(log) == 200 + 2  # every iteration once, and two tests


def test_committed_table_is_that_of_the_runs():
    text = table(read_rows(COMMITTED))
    assert text.splitlines()[2].split("|")[1:3] == [f" {'BN':32} ", " 51.4 ± 0.4 "]
    assert text in (ROOT / "docs/classification.md").read_text()
    assert (COMMITTED.parent / "table.md").read_text() == f"{text}\n"
