"""checkpoint/io.py: hostile, damaged and half-written files."""

import gzip
import os
import pickle
import random
import resource
import signal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hostile import Hostile
from mabn_d2 import CheckpointError, convert_imagenet
from mabn_d2.checkpoint import read_checkpoint, write_checkpoint
from mabn_d2.checkpoint.io import atomic_file
from published_resnet import PublishedResNet


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
@pytest.mark.parametrize("form", ["pickle 0", "pickle 2", "pickle 4", "zip", "legacy"])
@pytest.mark.parametrize("call, name", [(os.mkdir, "mkdir"), (eval, "eval"), (getattr, "getattr")])
def test_hostile_files_are_refused_by_name(suffix, form, call, name, tmp_path):
    trap = tmp_path / "trap"
    arguments = {
        "mkdir": [str(trap)],
        "eval": [f"open({str(trap)!r}, 'w')"],
        "getattr": [1, "real"],
    }
    data = {"model": {"conv1.weight": Hostile(call, *arguments[name])}, "__author__": "x"}
    path = tmp_path / f"weights.{suffix}"
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(data, protocol=int(form[-1])))
    else:
        torch.save(data, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=rf"{path} is refused.*\b{name},"):
        read_checkpoint(path)
    assert not trap.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_plain_containers(protocol, tmp_path):
    arrays = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "scalar": np.float64(2.5),
        "empty": np.zeros((0, 4), np.float16),
    }
    data = {"model": arrays, "other": [1, "é", b"\xff", None, (2.5, {"a": True})]}
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    found = read_checkpoint(path)
    for name, value in arrays.items():
        np.testing.assert_array_equal(found["model"][name], value)
        assert found["model"][name].dtype == value.dtype
    # Pickles of Python 2 hold bytes as strings; protocols below 3 are read as theirs.
    assert found["other"][1] == "é" and found["other"][3:] == data["other"][3:]


@pytest.mark.parametrize(
    "value", [np.array([print], object), np.array(["a"]), np.dtype("f4"), np.ndarray]
)
def test_other_arrays_are_refused(value, tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": value}))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "a.pkl")


def test_memory_bomb(tmp_path):
    # One byte of data and a request for 4 billion places.
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02}r\xff\xff\xff\xff.")
    with pytest.raises(CheckpointError, match="memo index"):
        read_checkpoint(tmp_path / "a.pkl")


FORMS = {"zip": "a.pth", "legacy": "a.pth", "pkl": "a.pkl"}


def whole_file(form, folder):
    """Write a small classifier's checkpoint; return its path and bytes."""
    path = folder / FORMS[form]
    state = PublishedResNet(18, width=2).state_dict()
    if form == "pkl":
        write_checkpoint({"model": state, "__author__": "x"}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    return path, path.read_bytes()


def converts(path):
    """Return whether a file converts, to weights that are valid, or is refused in one line."""
    try:
        weights = convert_imagenet(read_checkpoint(path))["model"]
    except CheckpointError as error:
        assert "\n" not in str(error)
        return False
    assert len(weights) == 80
    assert all(value.isfinite().all() for value in weights.values())
    assert all((v >= 0).all() for k, v in weights.items() if k.endswith("running_var"))
    return True


@pytest.mark.parametrize("form", FORMS)
def test_thousand_mutations(form, tmp_path):
    rng = random.Random(form)
    path, whole = whole_file(form, tmp_path)
    refused = 0
    for i in range(1000 // 3 + 1):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            # Half of them in the headers of records, or the names and shapes of a pickle.
            data[rng.randrange(len(data) if i % 2 else min(len(data), 4000))] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data))] if i % 5 == 0 else data)
        refused += not converts(path)
    assert refused > 100


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    return {form: whole_file(form, tmp_path_factory.mktemp(form)) for form in FORMS}


@pytest.mark.fuzz
@given(
    st.sampled_from(list(FORMS)),
    st.lists(
        st.tuples(st.integers(0, 2**20), st.binary(max_size=9), st.integers(0, 9)), max_size=4
    ),
    st.integers(0, 2**20) | st.none(),
)
def test_any_damage(whole_files, form, edits, end):
    """Bytes replaced, inserted and removed anywhere, a file cut anywhere."""
    path, whole = whole_files[form]
    data = bytearray(whole)
    for start, new, removed in edits:
        start %= len(data) + 1
        data[start : start + removed] = new
    path.write_bytes(data if end is None else data[: end % (len(data) + 1)])
    converts(path)


def test_empty_and_truncated(tmp_path):
    for suffix in ("pth", "pkl"):
        path = tmp_path / f"a.{suffix}"
        write_checkpoint({"model": {"w": torch.ones(100)}}, path)
        whole = path.read_bytes()
        for size in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match="no whole checkpoint"):
                read_checkpoint(path)


def test_other_formats_are_named(tmp_path):
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    np.savez(tmp_path / "a.npz", w=np.ones(2))
    np.save(tmp_path / "a.npy", np.ones(2))
    torch.jit.script(torch.nn.ReLU()).save(tmp_path / "a.pt")
    for content, message in (
        (len(header).to_bytes(8, "little") + header + bytes(4), "a safetensors file: torch.save"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a pointer of Git LFS .*: run git lfs pull",
        ),
        (b"\n<!DOCTYPE html><html>", "a web page: download the file itself"),
        ((tmp_path / "a.npz").read_bytes(), "an archive of numpy: torch.save"),
        ((tmp_path / "a.npy").read_bytes(), "one array of numpy: a checkpoint needs"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file: save its weights"),
        (gzip.compress(b"x"), "compressed: unpack it"),
        ((tmp_path / "a.pt").read_bytes(), "a TorchScript model: use the checkpoint"),
    ):
        (tmp_path / "a.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"a.pth is {message}"):
            read_checkpoint(tmp_path / "a.pth")


@pytest.fixture
def full_disk():
    """No file grows beyond 100 kB, as if the disk were full there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_full_disk_leaves_what_was_there(suffix, tmp_path, full_disk):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointError, match="can't write .*File too large"):
        write_checkpoint({"model": {"w": torch.zeros(1_000_000)}}, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_kill_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"old")
    child = os.fork()
    if child == 0:
        with atomic_file(path) as file:
            file.write(b"new" * 100_000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


def test_failure_while_writing(tmp_path):
    with pytest.raises(KeyError), atomic_file(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyError
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="No such file or directory"):
        write_checkpoint({"model": {}}, tmp_path / "no" / "a.pth")
