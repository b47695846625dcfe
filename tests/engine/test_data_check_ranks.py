"""Two processes: the files are parsed once, corrections reach both, an error is said once."""

import json
import os
import subprocess
import sys

import pytest

from coco_datasets import make_dataset
from commands import lines
from paths import ROOT


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_two_processes(tmp_path, policy):
    data = make_dataset(tmp_path)
    data["train"]["annotations"][1]["bbox"] = [500, 0, 5, 5]
    for annotation in data["val"]["annotations"]:
        del annotation["area"]
    for split, content in data.items():
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    support = ROOT / "tests/support"
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}:{support}", "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, support / "two_data_ranks.py", str(tmp_path), policy], cwd=ROOT,
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    if policy == "stop":
        assert done.returncode == 1
        (line,) = [line for line in lines(done.stderr) if "annotation 2" in line]
        assert line.startswith("two_data_ranks.py: ") and "outside of the image" in line
        assert "Traceback" not in done.stderr and not (tmp_path / "output").exists()
        return
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    # Each file once on this machine, for the check and the training of both.
    assert sorted(ranks[0]["parsed"]) == ["train.json", "val.json"] and ranks[1]["parsed"] == []
    assert ranks[0]["records"] == ranks[1]["records"]
    assert [len(r["annotations"]) for r in ranks[0]["records"]] == [1, 2, 2, 2, 2, 2, 1]
    assert ranks[0]["results"] >= 0
    printed = (done.stderr + done.stdout).splitlines()
    assert sum("1 annotations are left out" in line for line in printed) == 2  # of each set
