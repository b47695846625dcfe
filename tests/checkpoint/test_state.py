"""checkpoint/state.py under hypothesis: any subset, prefix and shape of a classifier's entries."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mabn_d2 import CheckpointError, convert_imagenet
from mabn_d2.checkpoint.state import rename, to_mabn
from published_resnet import PublishedResNet, add_windows

torch.manual_seed(0)
PLAIN = PublishedResNet(18, width=2, classes=3).state_dict()
WINDOWS = add_windows(PLAIN, "detection") | add_windows(PLAIN, "classification")
EXTRA = sorted(WINDOWS.keys() - PLAIN.keys()) + ["fc.weight", "fc.bias"]
NEEDED = sorted(PLAIN.keys() - {"fc.weight", "fc.bias"})
EXPECTED = convert_imagenet(PLAIN)["model"]


def averaged(state):
    """The entries of torch.optim.swa_utils.AveragedModel."""
    return {"n_averaged": torch.tensor(3)} | {f"module.{name}": v for name, v in state.items()}


wrapping = st.sampled_from(
    [
        lambda s: s,
        lambda s: {"model": s},
        lambda s: {"state_dict": s, "epoch": 1},
        averaged,
        lambda s: {"model_ema": {f"module.{name}": v for name, v in averaged(s).items()}},
    ]
)
many = settings(max_examples=60, deadline=None, derandomize=True)


@many
@given(st.sets(st.sampled_from(EXTRA)), st.integers(0, 3), wrapping, st.randoms())
def test_extras_prefixes_and_order_make_no_difference(extra, prefixes, wrap, random):
    names = [*NEEDED, *extra]
    random.shuffle(names)
    checkpoint = convert_imagenet(wrap({"module." * prefixes + n: WINDOWS[n] for n in names}))
    assert checkpoint["model"].keys() == EXPECTED.keys()
    assert all(torch.equal(value, EXPECTED[name]) for name, value in checkpoint["model"].items())
    dropped = {name for names in checkpoint["mabn_d2"]["dropped"].values() for name in names}
    assert len(dropped - {"epoch", "n_averaged"}) == len(extra)


@many
@given(st.sets(st.sampled_from(NEEDED), min_size=1, max_size=len(NEEDED)))
def test_any_missing_entries_are_an_error(missing):
    try:
        convert_imagenet({n: v for n, v in PLAIN.items() if n not in missing})
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        raise AssertionError("not refused")


@many
@given(st.sampled_from(NEEDED), st.lists(st.integers(0, 5), max_size=5))
def test_any_other_shape_is_an_error_or_only_reshaped(name, shape):
    value = torch.ones(shape)
    try:
        found = convert_imagenet(PLAIN | {name: value})["model"]
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    assert value.numel() == PLAIN[name].numel()
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in EXPECTED.items()}


@many
@given(
    st.dictionaries(
        st.text(max_size=30), st.sampled_from([torch.ones(2), 3, None, "x"]), max_size=5
    )
)
def test_any_other_names_are_an_error(entries):
    for state in (entries, PLAIN | entries):
        try:
            convert_imagenet(state)
        except CheckpointError as error:
            assert "\n" not in str(error)
        else:
            assert not entries and state == PLAIN


@many
@given(st.integers(2, 9), st.integers(0, 2**32), st.floats(-3, 3), st.booleans())
def test_centred_batch_norm_is_exact(channels, seed, shift, with_bias):
    """y = BN(conv(x)) in evaluation, for filters that are centred: folding changes nothing."""
    torch.manual_seed(seed)
    conv = torch.nn.Conv2d(3, channels, 3, bias=with_bias).double()
    norm = torch.nn.BatchNorm2d(channels).double().eval()
    with torch.no_grad():
        conv.weight -= conv.weight.mean((1, 2, 3), keepdim=True)
        norm.running_mean.normal_(shift)
        norm.running_var.uniform_(0.1, 3)
        norm.weight.normal_()
        norm.bias.normal_()
        x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
        state = rename(conv.state_dict(), lambda n: f"c.{n}")
        state |= rename(norm.state_dict(), lambda n: f"c.norm.{n}")
        new, dropped, recalibrate = to_mabn(state)
        assert not recalibrate
        assert set(new) == {"c.weight", "c.norm.weight", "c.norm.bias", "c.norm.running_var"}
        assert sum(map(len, dropped.values())) == 2 + with_bias
        weight, gamma, beta, var = (
            new[n].double()
            for n in ("c.weight", "c.norm.weight", "c.norm.bias", "c.norm.running_var")
        )
        y = torch.nn.functional.conv2d(x, weight) / (var + 1e-5).sqrt()[:, None, None]
        y = y * gamma[:, None, None] + beta[:, None, None]
        torch.testing.assert_close(y, norm(conv(x)), rtol=1e-4, atol=1e-4)
