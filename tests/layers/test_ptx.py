"""The compiled Triton kernels, executed by an emulator: values, races, bounds and alignment.

Triton compiles for one GPU in a process; see ptx/gpu.py. So ptx/checks.py runs in processes of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mabn_d2.layers.ops import triton_ops
from paths import ROOT

pytestmark = pytest.mark.skipif(
    triton_ops.unavailable() is not None, reason=str(triton_ops.unavailable())
)
CHECKS = Path(__file__).with_name("ptx") / "checks.py"


CAPABILITIES = [80, 90]


def start_checks(capability, *arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return subprocess.Popen(
        [*command, "-o", "python_functions=check_*", CHECKS, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PTX_CAPABILITY": str(capability), "CUDA_VISIBLE_DEVICES": ""},
    )


def assert_passes(process):
    output, _ = process.communicate()
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def processes():
    """The checks for both GPUs, side by side."""
    started = {
        capability: start_checks(capability, "-m", "not slow") for capability in CAPABILITIES
    }
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_ptx(capability, processes):
    assert_passes(processes[capability])


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_ptx_of_any_layer(capability):
    assert_passes(start_checks(capability, "-m", "slow"))
