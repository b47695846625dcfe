"""The comparison: its configs are fair, finished runs are kept, everything it promises is written."""

import csv
import json
import runpy
from types import SimpleNamespace

import pytest

from conftest import ROOT

TOOL = runpy.run_path(str(ROOT / "tools/compare_norms.py"))
SMALL = [
    "DATASETS.TRAIN", "('small_scenes_train',)", "DATASETS.TEST", "('small_scenes_val',)",
    "DATALOADER.NUM_WORKERS", "0", "SOLVER.MAX_ITER", "12", "MODEL.RESNETS.STEM_OUT_CHANNELS", "32",
    "TEST.EVAL_PERIOD", "0", "TEST.DETECTIONS_PER_IMAGE", "5", "SOLVER.WARMUP_ITERS", "2",
]


def test_rows_differ_in_norm_and_images_only():
    args = SimpleNamespace(config_file=TOOL["CONFIG"], opts=[], num_gpus=0)
    two, large = (TOOL["make_config"](args, row, 1) for row in ("MABN:2", "BN:16"))
    for cfg, norm, images in ((two, "MABN", 2), (large, "BN", 16)):
        assert {cfg.MODEL[node].NORM for node in TOOL["NODES"]} == {norm} and cfg.SEED == 1
        assert cfg.SOLVER.IMS_PER_BATCH == images
    changed = {line.split(":")[0].strip() for line in
               set(two.dump().splitlines()) ^ set(large.dump().splitlines())}
    assert changed == {"NORM", "IMS_PER_BATCH", "OUTPUT_DIR"}


def test_runs_once_and_writes_everything(small_scenes, tmp_path, capsys):
    output = tmp_path / "results"

    def run(*opts):
        TOOL["main"](["--rows", "MABN:2", "BN:4", "--seeds", "0", "1", "--num-gpus", "0", "--output",
                      str(output), "--set", *SMALL, "OUTPUT_DIR", str(tmp_path / "runs"), *opts])

    run()
    with open(output / "runs.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["row"], r["seed"], r["iterations"]) for r in rows] == [
        ("MABN:2", "0", "12"), ("BN:4", "0", "12"), ("MABN:2", "1", "12"), ("BN:4", "1", "12"),
    ]
    result = json.loads((tmp_path / "runs/BN_4/seed1/result.json").read_text())
    assert float(rows[3]["segm AP"]) == result["segm AP"] >= 0 < float(rows[3]["s/iteration"])
    table = (output / "table.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n") == 4 and "±" in table
    for name in ("curves.png", "predictions.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")

    results = list((tmp_path / "runs").glob("*/*/result.json"))
    times = [path.stat().st_mtime_ns for path in results]
    run()
    assert len(results) == 4 and times == [path.stat().st_mtime_ns for path in results]
    with pytest.raises(SystemExit, match="is of another config: remove it"):
        run("SOLVER.MOMENTUM", "0.8")
