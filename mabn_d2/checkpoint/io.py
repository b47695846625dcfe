"""Checkpoint files: read without running code, written whole or not at all."""

import os
import pickle
import pickletools
import re
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch

SUFFIXES = (".pth", ".pkl")
_TORCH_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")  # of files older than zip


# What files of other formats start with, and what they are.
_FORMATS = {
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself: run git lfs pull",
    b"\x93NUMPY": "one array of numpy: a checkpoint needs all of a model's weights, by name",
    b"\x89HDF": 'an HDF5 file: save its weights by name with torch.save({"model": ...}, "FILE.pth")',
    b"\x1f\x8b": "compressed: unpack it with gunzip",
}


class CheckpointError(ValueError):
    """One line that names the file or the entries, what is wrong and what to do."""

    def __init__(self, message: str) -> None:
        # Names come from the file, and must neither break the line nor steer the terminal.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def _encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode`, which protocol 2 stores bytes by; other encodings could unpack a bomb."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


class _DType:
    """Stands for numpy.dtype, whose own __setstate__ trusts what it is given."""

    def __init__(self, code: str, *flags: bool) -> None:
        if not re.fullmatch("[<>|=]?[biuf][1248]", code):
            raise pickle.UnpicklingError(f"arrays of {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for numpy.ndarray; `array` is there after __setstate__."""

    def __init__(self, cls: type, shape: tuple[int, ...], code: bytes) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.array = _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(
    data: str | bytes, dtype: _DType, shape: tuple[int, ...] = (), order: Literal["C", "F"] = "C"
) -> np.ndarray:
    if isinstance(data, str):  # bytes of Python 2
        data = data.encode("latin1")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order).copy(order="K")


def _plain(value: Any) -> Any:
    """Return value with every _Array in its containers replaced by the array."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    if isinstance(value, (_DType, type)):
        raise pickle.UnpicklingError(f"{value} is no weight")
    return value.array if isinstance(value, _Array) else value


_ALLOWED: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "numpy.ndarray": _Array,
    "numpy.dtype": _DType,
    "_codecs.encode": _encode,
    "__builtin__.bytes": lambda: b"",  # how protocols below 3 store that one
}
for _core in ("_core", "core"):  # of numpy 2 and of numpy 1
    _ALLOWED[f"numpy.{_core}.multiarray._reconstruct"] = _Array
    _ALLOWED[f"numpy.{_core}.multiarray.scalar"] = lambda dtype, data: _array(data, dtype)[()]
    _ALLOWED[f"numpy.{_core}.numeric._frombuffer"] = _array


class _ArrayUnpickler(pickle.Unpickler):
    """Knows plain containers and numpy arrays; any other name ends the reading."""

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in _ALLOWED:
            raise _Refused(full_name)
        return _ALLOWED[full_name]


class _Refused(pickle.UnpicklingError):
    pass


_TENSORS: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch.Size": torch.Size,
    **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
}


class _TensorUnpickler(_ArrayUnpickler):
    """Knows tensors too; torch's reader derives its own unpickler from it."""

    def find_class(self, module: str, name: str) -> Any:
        found = _TENSORS.get(f"{module}.{name}")
        return super().find_class(module, name) if found is None else found


class _Pickle:
    """What torch.load wants of a `pickle_module`."""

    Unpickler = _TensorUnpickler

    @staticmethod
    def load(file: IO[bytes], **kwargs: Any) -> Any:
        return _TensorUnpickler(file, **kwargs).load()


def weights_file(weights: str) -> str:
    """Return a value of MODEL.WEIGHTS without "?matching_heuristics=True", which Detectron2 reads there."""
    return weights.partition("?")[0]


def read_checkpoint(path: str | Path) -> Any:
    """Return what a checkpoint file holds: plain containers, tensors on the CPU, numpy arrays.

    torch's files (zip or older) are read with `weights_only`, and if they hold numpy arrays or
    scalars too, by an unpickler that knows tensors and these. Any other file is a pickle of plain
    containers and numpy arrays, as in the model zoos of Detectron and Detectron2.

    Raises:
        CheckpointError: for a file that is not there, is damaged, or would run code, which is not
            run but named.
    """
    try:
        file = open(path, "rb")
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    with file:
        # First, because torch before 2.6 hands a TorchScript file to its own loader.
        if other := _other_format(file):
            raise CheckpointError(f"{path} is {other}")
        try:
            file.seek(0)
            return _read(file)
        except Exception as error:  # a damaged file makes the readers raise anything
            refused = _refused_name(error)
            if refused:
                raise CheckpointError(
                    f"{path} is refused, and nothing of it was run: it asks for {refused}, which "
                    "weights don't need; use a file from a source that you trust, of tensors only"
                ) from error
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise CheckpointError(
                f"{path} is no whole checkpoint ({reason}): copy or download it again"
            ) from error


def _other_format(file: IO[bytes]) -> str | None:
    """Return what a file is that can't be read as a checkpoint, with the remedy; None if unknown."""
    start = file.read(64)
    if start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < 2**27:  # length of the header
        return 'a safetensors file: torch.save(safetensors.torch.load_file(FILE), "FILE.pth") converts it'
    for first, format in _FORMATS.items():
        if start.startswith(first):
            return format
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page: download the file itself"
    if start.startswith(b"PK"):
        # A damaged archive makes the reader raise anything.
        with suppress(Exception), zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in names):
                return "a TorchScript model: use the checkpoint that it was made from"
            if names and all(name.endswith(".npy") for name in names):
                return 'an archive of numpy: torch.save({"model": dict(numpy.load(FILE))}, "FILE.pth") converts it'
    return None


def _read(file: IO[bytes]) -> Any:
    start = file.read(64)
    if start.startswith(b"PK"):
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch itself would load the wrong numbers
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    elif _TORCH_MAGIC not in start:
        return _read_arrays(file)
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch refuses numpy's own unpickling, which trusts the file; _ALLOWED has stand-ins.
        refused = _refused_name(error)
        if not refused or not refused.startswith(("numpy.", "_codecs.")):
            raise
    file.seek(0)
    return _plain(torch.load(file, map_location="cpu", weights_only=False, pickle_module=_Pickle))


def _read_arrays(file: IO[bytes]) -> Any:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    for opcode, argument, _ in pickletools.genops(file):
        # Unpickling would reserve memory for as many entries.
        if opcode.name in ("PUT", "LONG_BINPUT") and isinstance(argument, int) and argument > size:
            raise pickle.UnpicklingError(f"memo index {argument}")
    file.seek(0)
    return _plain(_ArrayUnpickler(file, encoding="latin1").load())


def _refused_name(error: Exception) -> str | None:
    """Return the name that the unpicklers refused, or None for another error."""
    if isinstance(error, _Refused):
        return str(error)
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL ([\w.]+)|[Cc]lass ([\w.]+)", str(error))
        return found and (found[1] or found[2]).rstrip(".")
    return None


def check_output(
    path: str | Path, source: str | Path | None = None, overwrite: bool = False
) -> None:
    """Raise CheckpointError if `path` can't be written; before anything else is done.

    Args:
        source: the file that is read, never written onto.
        overwrite: whether `path` may exist.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"the output {path} must end in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise CheckpointError(f"the output {path} is a folder: name a file")
    try:
        check_writable(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"the output {path} can't be written ({error}): name another file"
        ) from error
    if path.exists():
        if source is not None and path.samefile(source):
            raise CheckpointError(f"the output {path} is the input: name another file")
        if not overwrite:
            raise CheckpointError(f"the output {path} exists: name another, or add --overwrite")


def check_writable(folder: str | Path) -> None:
    """Raise OSError if no file can be written to a folder, which is not created if it is missing."""
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    with tempfile.TemporaryFile(dir=there):
        pass


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write {"model": state dict, ...} to a `.pth`, or with numpy arrays to a `.pkl`, whole.

    Raises:
        CheckpointError: if it can't be written; then `path` is as it was.
    """
    with atomic_file(path) as file:
        if Path(path).suffix == ".pkl":
            arrays = {name: value.numpy() for name, value in checkpoint["model"].items()}
            pickle.dump({**checkpoint, "model": arrays}, file, protocol=4)
        else:
            torch.save(checkpoint, file)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that takes the place of `path` once it is whole and on the disk.

    Raises:
        CheckpointError: if it can't be written; then `path` is as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch's writer raises the latter
            cause = error if isinstance(error, OSError) else error.__context__ or error
            reason = getattr(cause, "strerror", None) or cause
            raise CheckpointError(
                f"can't write {path}: {reason}; files written before are unchanged: free space or "
                "permit writing there"
            ) from error
        raise


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder can't be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            # The file is whole in any case; some network file systems can't do this.
            with suppress(OSError):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
