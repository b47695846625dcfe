"""The comparison: its configs are fair, finished runs are kept, everything it promises is written."""

import csv
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from commands import run
from mabn_d2.commands.compare_norms import CONFIG, main
from mabn_d2.comparison import runs
from mabn_d2.comparison.rows import parse_row, row_of_folder
from mabn_d2.comparison.runs import NODES, make_config
from mabn_d2.config_files import get_config_file
from mabn_d2.engine import Trainer
from mabn_d2.engine.model_check import build_without_data
from mabn_d2.layers import MABN2d

SMALL = [
    "DATASETS.TRAIN",
    "('small_scenes_train',)",
    "DATASETS.TEST",
    "('small_scenes_val',)",
    "DATALOADER.NUM_WORKERS",
    "0",
    "SOLVER.MAX_ITER",
    "12",
    "MODEL.RESNETS.STEM_OUT_CHANNELS",
    "32",
    "TEST.EVAL_PERIOD",
    "0",
    "TEST.DETECTIONS_PER_IMAGE",
    "5",
    "SOLVER.WARMUP_ITERS",
    "2",
]


def compare(output, *opts, rows=("MABN:2",), seeds=("0",)):
    main(
        [
            "--rows",
            *rows,
            "--seeds",
            *seeds,
            "--num-gpus",
            "0",
            "--output",
            str(output),
            "--set",
            *SMALL,
            *opts,
        ]
    )


@pytest.mark.parametrize("num_gpus", [0, 4])  # of which a row of one process takes one
def test_rows_differ_in_norm_and_images_only(num_gpus):
    args = SimpleNamespace(
        config_file=get_config_file(CONFIG), opts=[], num_gpus=num_gpus, output=Path("output/test")
    )
    two, large = (make_config(args, row, 1) for row in ("MABN:2", "BN:16"))
    for cfg, norm, images in ((two, "MABN", 2), (large, "BN", 16)):
        assert {cfg.MODEL[node].NORM for node in NODES} == {norm} and cfg.SEED == 1
        assert images == cfg.SOLVER.IMS_PER_BATCH
    changed = {
        line.split(":")[0].strip()
        for line in set(two.dump().splitlines()) ^ set(large.dump().splitlines())
    }
    assert changed == {"NORM", "IMS_PER_BATCH", "OUTPUT_DIR"}


@pytest.mark.parametrize(
    "name, backbone",
    [
        ("retinanet_R50_FPN_mabn_2x.yaml", "build_retinanet_resnet_fpn_backbone"),
        ("panoptic_fpn_R50_FPN_mabn_2x.yaml", "build_any_norm_resnet_fpn_backbone"),
    ],
)
def test_no_norm_of_another_row_is_left_in_the_heads(name, backbone):
    args = SimpleNamespace(
        config_file=get_config_file(name),
        opts=["MODEL.WEIGHTS", "", "MODEL.BACKBONE.NAME", backbone],
        num_gpus=0,
        output=Path("output/test"),
    )
    model = build_without_data(make_config(args, "BN:2", 0))
    assert not any(isinstance(module, MABN2d) for module in model.modules())


@pytest.mark.parametrize(
    "row, images, steps",
    [("MABN:8/2", 8, 4), ("GN:8/2", 8, 4), ("BN:8/8", 8, 1), ("MABN:8/1x2", 16, 8)],
)
def test_rows_with_micro_batches(row, images, steps):
    args = SimpleNamespace(
        config_file=get_config_file(CONFIG), opts=[], num_gpus=0, output=Path("output/test")
    )
    cfg = make_config(args, row, 0)
    assert images == cfg.SOLVER.IMS_PER_BATCH and steps == cfg.SOLVER.ACCUMULATION_STEPS
    assert parse_row(row).processes == images // 8
    folder = Path(cfg.OUTPUT_DIR).parent.name
    assert folder == row.replace(":", "_").replace("/", "_by_") and row_of_folder(folder) == row


def test_runs_once_and_writes_everything(small_scenes, tmp_path, capsys):
    rows, seeds = ("MABN:4/2", "BN:4"), ("0", "1")
    compare(tmp_path, rows=rows, seeds=seeds)
    with open(tmp_path / "runs.csv") as file:
        lines = list(csv.DictReader(file))
    assert [(r["row"], r["seed"], r["iterations"]) for r in lines] == [
        ("MABN:4/2", "0", "12"),
        ("BN:4", "0", "12"),
        ("MABN:4/2", "1", "12"),
        ("BN:4", "1", "12"),
    ]
    result = json.loads((tmp_path / "runs/BN_4/seed1/result.json").read_text())
    assert float(lines[3]["segm AP"]) == result["segm AP"] >= 0 < float(lines[3]["s/iteration"])
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n") == 4 and "±" in table
    for name in ("curves.png", "predictions.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    results = list((tmp_path / "runs").glob("*/*/result.json"))
    times = [path.stat().st_mtime_ns for path in results]
    compare(tmp_path, rows=rows[1:])  # the runs that are not named stay in the table
    assert len(results) == 4 and times == [path.stat().st_mtime_ns for path in results]
    with open(tmp_path / "runs.csv") as file:
        again = list(csv.DictReader(file))
    assert len(again) == 4 and all(line in lines for line in again)
    assert sorted((tmp_path / "table.md").read_text().splitlines()) == sorted(table.splitlines())

    before = (tmp_path / "runs.csv").read_bytes()
    with pytest.raises(SystemExit, match="BN_4/seed0/config.yaml is of another config"):
        compare(tmp_path, "SOLVER.MOMENTUM", "0.8", rows=("GN:2",))
    shutil.rmtree(tmp_path / "runs/BN_4/seed1")
    with pytest.raises(
        SystemExit, match="runs.csv lists BN:4 with seed 1, but .*/runs has no such"
    ):
        compare(tmp_path, rows=("GN:2",))
    assert (tmp_path / "runs.csv").read_bytes() == before


class Killed(Trainer):
    def after_step(self):
        super().after_step()
        if self.iter == 7:
            raise KeyboardInterrupt


def test_a_stopped_run_is_resumed_and_equals_the_straight_one(small_scenes, tmp_path, monkeypatch):
    opts = ["SOLVER.CHECKPOINT_PERIOD", "5"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    compare(straight, *opts)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "Trainer", Killed)
        compare(resumed, *opts)
    run = resumed / "runs/MABN_2/seed0"
    assert (run / "last_checkpoint").read_text() == "model_0000004.pth"
    for other in (
        ["SOLVER.MOMENTUM", "0.8"],
        ["SOLVER.MAX_ITER", "10"],
        ["MODEL.FPN.OUT_CHANNELS", "16"],
    ):
        with pytest.raises(SystemExit, match="is of another config: remove|holds a run with other"):
            compare(resumed, *opts, *other)
    compare(resumed, *opts)
    assert "Starting training from iteration 5" in (run / "log.txt").read_text()
    one, two = (
        torch.load(folder / "runs/MABN_2/seed0/model_final.pth", weights_only=False)["model"]
        for folder in (straight, resumed)
    )
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(SystemExit, match="is of another config"):  # of a finished one either
        compare(resumed, *opts, "SOLVER.MOMENTUM", "0.8")


def test_row_of_several_processes(tmp_path):
    done = run(
        "compare_norms.py", "--num-gpus", 0, "--rows", "MABN:1x2", "--seeds", 5, "--output", tmp_path,
        "--set", "DATASETS.TRAIN", "('digit_scenes_train',)", "DATASETS.TEST", "('digit_scenes_val',)",
        *SMALL[4:], "SOLVER.MAX_ITER", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/MABN_1x2/seed5"
    assert yaml.safe_load((folder / "config.yaml").read_text())["SOLVER"]["IMS_PER_BATCH"] == 2
    result = json.loads((folder / "result.json").read_text())
    assert result["iterations"] == 2 and math.isnan(result["s/iteration"])  # too short to be timed
    assert (tmp_path / "table.md").read_text().splitlines()[2].startswith("| MABN:1x2 ")
    log = (folder / "log.txt").read_text()
    assert "Rank of current process: 0. World size: 2" in log
    model = torch.load(folder / "model_final.pth", weights_only=False)["model"]
    assert model["backbone.bottom_up.stem.conv1.norm.buffer_x2"].shape[0] == 32  # one image each


@pytest.mark.parametrize(
    "row, message",
    [
        ("SyncBN:8", "use BN:8"),
        ("naiveSyncBN:8", "use BN:8"),
        ("MABN", "write NORM:IMAGES"),
        ("MABM:2", "unknown norm 'MABM'"),
        ("MABN:2x0", "write NORM:IMAGES"),
        ("MABN:8/0", "write NORM:IMAGES"),
        ("MABN:8/3", "8 images can't be divided into micro-batches of 3"),
        ("MABN:2/4", "2 images can't be divided into micro-batches of 4"),
        ("SyncBN:2x2", 'use "naiveSyncBN"'),
    ],
)
def test_rows_that_would_be_something_else(tmp_path, row, message):
    with pytest.raises(SystemExit, match=message):
        compare(tmp_path, rows=("MABN:2", row))
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_repeated_or_written_is_refused_first(tmp_path):
    with pytest.raises(SystemExit, match="--seeds has -1: use 0 or more"):
        compare(tmp_path / "new", seeds=("0", "-1"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"--output '.*/file' can't be written to"):
        compare(tmp_path / "file")
    with pytest.raises(SystemExit, match="SOLVER.MAX_ITER has no value"):
        compare(tmp_path / "new", "SOLVER.MAX_ITER")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
