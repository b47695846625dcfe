"""Any value in any key that this package reads: a config that works, or one clear line."""

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mabn_d2.engine import ConfigError, setup_config
from paths import ROOT

CONFIG = str(ROOT / "configs/digits/scratch_mask_rcnn_R18_FPN_mabn.yaml")
KEYS = [
    "MODEL.MABN.BATCH_SIZE", "MODEL.MABN.SIMULATED_BATCH_SIZE", "MODEL.MABN.MOMENTUM",
    "MODEL.MABN.WARMUP_ITERS", "MODEL.MABN.CLIP_START", "MODEL.MABN.CLIP_LIMIT", "MODEL.MABN.EPS",
    "MODEL.MABN.SYNC_BEFORE_EVAL", "MODEL.MABN", "MODEL.MABM", "MODEL.BRN.R_MAX",
    "MODEL.BRN.WARMUP_ITERS", "MODEL.BRN.D_MAX_ITER", "MODEL.BRN", "DATALOADER.BAD_INPUT",
    "SOLVER.OPTIMIZER", "SOLVER.IMS_PER_BATCH", "MODEL.RESNETS.NORM", "MODEL.FPN.NORM",
    "MODEL.ROI_BOX_HEAD.NORM", "DATASETS.TRAIN", "DATASETS.TEST", "MODEL.WEIGHTS", "SEED",
]  # fmt: skip
VALUES = st.one_of(
    st.integers(-3, 70).map(str),
    st.floats().map(repr),
    st.sampled_from(
        ["True", "None", "()", "[]", "{}", "('a',)", "MABN", "GN", "''", "(", "skip", "1e400"]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6),
)


def load(options, folder):
    args = argparse.Namespace(
        config_file=CONFIG, opts=[*options, "OUTPUT_DIR", str(folder)], num_gpus=2, num_machines=1,
        resume=False, eval_only=False,
    )  # fmt: skip
    return setup_config(args)


@pytest.mark.fuzz
@given(pairs=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=3), odd=st.booleans())
def test_any_options(tmp_path_factory, pairs, odd):
    options = [part for pair in pairs for part in pair][: -1 if odd else None]
    try:
        cfg = load(options, tmp_path_factory.getbasetemp() / "output")
    except ConfigError as error:
        assert str(error) and "\n" not in str(error)
    else:
        from mabn_d2.layers import MABN2d
        from mabn_d2.modeling.norm_table import norm_settings

        MABN2d(4, **norm_settings(cfg))


@pytest.mark.parametrize(
    "options, message",
    [
        (["MODEL.MABN.MOMENTUM", "1.5"], "momentum"),
        (["MODEL.MABN.EPS", "0.0"], "eps"),
        (["MODEL.MABN.BATCH_SIZE", "-1"], r"batch_size \(-1\)"),
        (["SOLVER.IMS_PER_BATCH", "None"], "SOLVER.IMS_PER_BATCH is None"),
        (["SOLVER.IMS_PER_BATCH", "-2"], "IMS_PER_BATCH is -2"),
        (["SOLVER.OPTIMIZER", "ADAM"], "SOLVER.OPTIMIZER is 'ADAM'"),
        (["MODEL.MABN.SIMULATED_BATCH_SIZE", "7640288749568"], "SIMULATED_BATCH_SIZE is 76402.* 16, of 32"),
        (["MODEL.MABN.SIMULATED_BATCH_SIZE", "None", "MODEL.MABN.SIMULATED_BATCH_SIZE", "1e9"], "SIMULATED"),
        (["MODEL.MABN", "3"], "MODEL.MABN"),
        (["MODEL.BRN.R_MAX", "0.5"], "MODEL.BRN: r_max"),
        (["MODEL.BRN.WARMUP_ITERS", "50000"], "MODEL.BRN: r_max_iter"),
        (["SEED"], "SEED has no value: write KEY VALUE"),
        (["SOLVER.BASE_LRR", "0.1"], r"SOLVER.BASE_LRR is no .* \(did you mean SOLVER.BASE_LR\?"),
        (["MODEL.WEIGHTS", "None", "MODEL.WEIGHTS", "1"], "WEIGHTS"),
        (["DATASETS.TRAIN", "None", "DATASETS.TRAIN", "0"], "TRAIN"),
        (["MODEL.MABN", "None", "MODEL.MABN", "3"], "MABN"),
    ],
)  # fmt: skip
def test_found_cases(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        load(options, tmp_path)
