"""Training under MODEL.MABN.LOG_PERIOD and the tool that draws what it wrote."""

import json

import pytest

from mabn_d2.commands.plot_statistics import main
from mabn_d2.engine import Trainer, statistics_plot
from mabn_d2.engine.hooks.log_statistics import LogStatistics


def watched(run):
    """The layers of the last record of a run's metrics.json, {layer: {statistic/kind}}."""
    layers = {}
    for key in json.loads((run / "metrics.json").read_text().splitlines()[-1]):
        if key.startswith("statistics/"):
            _, layer, rest = key.split("/", 2)
            layers.setdefault(layer, set()).add(rest)
    return layers


def test_training_writes_and_the_tool_draws(digits_cfg, tmp_path, capsys, monkeypatch):
    digits_cfg.DATASETS.TEST = ()
    digits_cfg.SOLVER.MAX_ITER = 2
    trainer = Trainer(digits_cfg)
    assert not any(isinstance(hook, LogStatistics) for hook in trainer._hooks)
    digits_cfg.MODEL.MABN.LOG_PERIOD = 1
    Trainer(digits_cfg).train()
    assert len(watched(tmp_path / "output")) == 3
    assert {"x2/ema", "psi/window", "r/batch"} <= watched(tmp_path / "output")[
        "backbone.bottom_up.stem.conv1.norm"
    ]
    for node in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        digits_cfg.MODEL[node].NORM = "BN"
    digits_cfg.MODEL.MABN.LOG_LAYERS = (
        "backbone.fpn_lateral2.norm",
        "roi_heads.box_head.conv1.norm",
    )
    bn = digits_cfg.clone()
    bn.OUTPUT_DIR = str(tmp_path / "bn")
    Trainer(bn).train()
    assert watched(tmp_path / "bn").keys() == set(bn.MODEL.MABN.LOG_LAYERS)

    drawn = {}
    plot = statistics_plot.plot
    monkeypatch.setattr(
        statistics_plot,
        "plot",
        lambda columns, output: (drawn.update(columns), plot(columns, output)),
    )
    picture = tmp_path / "statistics.png"
    main(
        [
            digits_cfg.OUTPUT_DIR,
            str(tmp_path / "bn"),
            "--output",
            str(picture),
            "--layer",
            "backbone.fpn_lateral2.norm",
        ]
    )
    assert list(drawn) == ["output\nbackbone.fpn_lateral2.norm", "bn\nbackbone.fpn_lateral2.norm"]
    assert [list(c) for c in drawn.values()] == [
        ["psi", "r", "r_clipped", "x2"],
        ["g", "mean", "psi", "var"],
    ]
    assert all(set(column["psi"]) == {"batch", "window", "ema"} for column in drawn.values())
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in capsys.readouterr().out
    drawn.clear()
    main([digits_cfg.OUTPUT_DIR, "--output", str(picture)])
    assert list(drawn) == ["output\nbackbone.fpn_lateral2.norm"]  # the middle one
    with pytest.raises(SystemExit, match="no statistics of stem: use one of"):
        main([digits_cfg.OUTPUT_DIR, "--layer", "stem"])
    digits_cfg.MODEL.MABN.LOG_LAYERS = ("stem",)
    with pytest.raises(ValueError, match="'stem'; there are backbone"):
        Trainer(digits_cfg)


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    """As the runs of tools/compare_norms.py, which end in seed0; a run may also come twice."""
    runs = [tmp_path / norm / "seed0" for norm in ("BN", "MABN", "MABN")]
    for run in runs:
        run.mkdir(parents=True, exist_ok=True)
        record = {"iteration": 19, "statistics/conv1.norm/var/batch": 1.0}
        (run / "metrics.json").write_text(json.dumps(record) + "\n")
    drawn = []
    monkeypatch.setattr(statistics_plot, "plot", lambda columns, output: drawn.extend(columns))
    main([*map(str, runs), "--output", str(tmp_path / "statistics.png")])
    assert [title for title, _ in drawn] == [
        f"{n}/seed0\nconv1.norm" for n in ("BN", "MABN", "MABN")
    ]
