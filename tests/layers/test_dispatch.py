"""The door to the kernels: which backend, said once, and nothing imports in a circle."""

import ast
import logging
from pathlib import Path

import pytest
import torch

import mabn_d2.layers
from mabn_d2.layers import MABN2d, SplitBatchNorm2d, SplitMABN2d
from mabn_d2.layers.ops import cpu_ops, dispatch, torch_ops, triton_ops
from mabn_d2.layers.ops.dispatch import select_backend

LAYERS = Path(mabn_d2.layers.__file__).parent


@pytest.fixture(autouse=True)
def nothing_logged(monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())


def test_the_choice_is_logged_once_for_each_device_and_reason(operators, caplog):
    caplog.set_level(logging.INFO, "mabn_d2")
    layer, wide = MABN2d(3), MABN2d(3, dtype=torch.float64)
    for _ in range(3):
        layer(torch.randn(2, 3, 4, 4)).sum().backward()
        wide(torch.randn(2, 3, 4, 4, dtype=torch.float64)).sum().backward()
    missing = "because the compiled operators are not installed (see docs/speed.md)"
    if operators is None:
        assert caplog.messages == [f"MABN on cpu: torch kernels, {missing}"]
        assert caplog.records[0].levelno == logging.WARNING
    else:
        assert caplog.messages == [
            "MABN on cpu: compiled CPU kernels",
            "MABN on cpu: torch kernels, because the compiled operators have no float64 (see docs/speed.md)",
        ]
        assert {record.levelno for record in caplog.records} == {logging.INFO}


def test_one_backend_takes_all_tensors_of_a_layer():
    x, wide = torch.ones(1, 2, 3, 3), torch.zeros(4, 2, dtype=torch.float64)
    assert select_backend(x, wide) is torch_ops
    assert select_backend(torch.ones(1, 2, 3, 3, device="meta")) is torch_ops
    if cpu_ops.OPERATORS is not None:
        assert select_backend(x) is select_backend(x, x) is cpu_ops


def test_every_backend_has_the_same_functions():
    names = "NAME unavailable unsupported mabn mabn_given affine combine product_sums square_sums"
    for backend in cpu_ops, torch_ops, triton_ops:
        assert not [name for name in names.split() if not hasattr(backend, name)]


def test_operators_of_another_version_are_an_error(monkeypatch):
    if cpu_ops._load() is None:  # not OPERATORS, which the fixture of other tests here may hide
        pytest.skip("this installation has no compiled operators")
    monkeypatch.setattr(cpu_ops, "INTERFACE_VERSION", 1000)
    with pytest.raises(ImportError, match="another version of mabn_d2.*build_ext --inplace"):
        cpu_ops._load()


def imports(path):
    """Return the modules of mabn_d2.layers that a file imports, inside of functions too."""
    package = ["mabn_d2", "layers", *path.relative_to(LAYERS).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            base = [part for part in base if part]
            found.add(".".join(base))
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def test_no_circle_of_imports_and_nothing_but_torch():
    files = {
        ".".join(["mabn_d2", "layers", *path.relative_to(LAYERS).with_suffix("").parts]): path
        for path in LAYERS.rglob("*.py")
        if path.name != "__init__.py"
    }
    graph = {name: imports(path) & files.keys() for name, path in files.items()}
    assert graph["mabn_d2.layers.mabn"] and graph["mabn_d2.layers.ops.dispatch"]
    while leaves := [name for name, needed in graph.items() if not needed]:
        for leaf in leaves:
            del graph[leaf]
        graph = {name: needed - set(leaves) for name, needed in graph.items()}
    assert not graph
    for path in files.values():
        assert all(name.startswith("mabn_d2.layers") for name in imports(path))


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the calls of aten's batch-norm kernels."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if "native_batch_norm" in function.name():
            self.calls.append((function.name(), arguments))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_cuda_can_run_the_torch_backend(monkeypatch, dtype, memory_format):
    """CUDA's batch-norm kernels need every tensor, in float32 beside half precision.

    `native_batch_norm_backward` asserts save_mean and save_invstd, and takes the dtype of the
    gradients from weight (aten/src/ATen/native/cuda/Normalization.cu). The CPU's kernels do not ask.
    """
    monkeypatch.setattr(cpu_ops, "OPERATORS", None)
    wide = torch.promote_types(dtype, torch.float32)
    settings = {"simulated_batch_size": 4, "dtype": wide}
    layers = [
        MABN2d(3, **settings),
        MABN2d(3, activation="relu", **settings),
        SplitMABN2d(3, **settings),
        SplitMABN2d(3, activation="relu", **settings),
        SplitBatchNorm2d(3, 2).to(wide),
    ]
    seen = set()
    for layer in layers:
        x = torch.randn(4, 3, 5, 4).to(dtype, memory_format=memory_format).requires_grad_()
        with Recorder() as recorder:
            layer(x).sum().backward()
        for name, arguments in recorder.calls:
            tensors = arguments[:7] if name.endswith("backward") else arguments[:5]
            activations = 2 if name.endswith("backward") else 1
            assert all(isinstance(tensor, torch.Tensor) for tensor in tensors), name
            assert {tensor.dtype for tensor in tensors[:activations]} == {dtype}
            assert {tensor.dtype for tensor in tensors[activations:]} == {wide}
            assert all(tensor.is_contiguous() for tensor in tensors[activations:])
            seen.add(name)
    assert "aten::native_batch_norm_backward" in seen
