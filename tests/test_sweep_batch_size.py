"""The sweep: runs side by side, repeats none, mixes no settings, draws."""

import csv
import subprocess
import sys

from conftest import ROOT

from mabn_d2.data.digit_crops import CropParams, make_digit_crops

SMALL = (
    "--arch small --crop 32 --val-resize 32 --batch-size 8 --epochs 1 --epoch-iters 3 --workers 0 "
    "--device cpu --lr 0.02"
).split()


def test_runs_once_and_draws(tmp_path):
    data = make_digit_crops(tmp_path / "crops", CropParams(num_train=64, num_val=49))

    def sweep(*more):
        return subprocess.run(
            [
                sys.executable, ROOT / "tools/sweep_batch_size.py", "--data", data, "--output", "out",
                "--runs", "runs", "--sizes", "2", "8", "--seeds", "0", "--jobs", "2",
                "--norms", "bn", "gn", "mabn", "--", *SMALL, *more,
            ],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip

    done = sweep()
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out/sweep.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    found = sorted((row["norm"], row["norm_batch"]) for row in rows)
    assert found == [("bn", "2"), ("bn", "8"), ("gn", "2"), ("mabn", "2"), ("mabn", "8")]
    assert all(0 <= float(row["top1_error"]) <= 100 for row in rows)
    picture = tmp_path / "out/sweep.png"
    assert picture.read_bytes().startswith(b"\x89PNG")

    picture.unlink()
    again = sweep()
    assert again.returncode == 0 and picture.exists() and "top1_error" not in again.stdout
    assert (tmp_path / "out/sweep.csv").read_text() == text

    other = sweep("--weight-decay", "0.1")
    assert other.returncode == 1 and "of other settings: name another --output" in other.stderr
    assert (tmp_path / "out/sweep.csv").read_text() == text
