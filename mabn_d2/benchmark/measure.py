"""Paired timing, memory peaks and the description of the machine."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..checkpoint.io import atomic_file
from ..engine.code_version import commit


def _host_seconds(clock: Callable[[], float], run: Callable[[], object]) -> float:
    start = clock()
    run()
    return clock() - start


def _cuda_seconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _repeat(function: Callable[[], Any], repeats: int) -> None:
    for _ in range(repeats):
        function()  # its result is freed before the next


# name -> function that runs a function and returns how long it took, in seconds
CLOCKS: dict[str, Callable[[Callable[[], object]], float]] = {
    "wall": partial(_host_seconds, time.perf_counter),
    "cpu": partial(_host_seconds, time.process_time),
    "cuda": _cuda_seconds,
}


def measure(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    round_seconds: float,
    clock: Callable[[Callable[[], object]], float],
    on_timing: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time functions in turn, so that a disturbance of the machine affects all of them.

    Args:
        functions: name -> function without arguments.
        rounds: how often each function is timed.
        round_seconds: about how long one timing takes; fast functions are repeated.
        clock: one of CLOCKS.
        on_timing: is called after each timing and after the warm-up of each function, so
            len(functions) * (rounds + 1) times.

    Returns:
        name -> list of `rounds` times of one call, in seconds.
    """

    def seconds(function: Callable[[], Any], repeats: int) -> float:
        return clock(lambda: _repeat(function, repeats)) / repeats

    repeats = {}
    for name, function in functions.items():
        seconds(function, 1)  # warm-up: allocations, kernel choices
        repeats[name] = max(1, round(round_seconds / seconds(function, 2)))
        on_timing()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function, repeats[name]))
            on_timing()
    return times


def memory_peak(function: Callable[[], object], device: str = "cpu") -> int:
    """Return the peak of the bytes of tensors that a call of `function` adds to those before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        total += change.nbytes()
        peak = max(peak, total)
    return peak


def summarize(times: Sequence[float], baseline: Sequence[float]) -> dict[str, list[float]]:
    """Return the quartiles of times (s) as "ms", and of the paired ratios to a baseline's times."""
    ratios = [a / b for a, b in zip(times, baseline, strict=True)]
    return {"ms": quartiles([1000 * t for t in times]), "ratio": quartiles(ratios)}


def quartiles(values: Sequence[float]) -> list[float]:
    """Return [first quartile, median, third quartile]."""
    return statistics.quantiles(values, n=4, method="inclusive")


def describe(device: str) -> dict:
    """Return the machine, versions and commit, which a result depends on."""
    machine = {"processor": _processor(), "cores": os.cpu_count()}
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"machine": machine, "versions": versions, "commit": commit() or "unknown"}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_json(report: dict, path: str | Path) -> None:
    """Write a report as JSON; its folder is made if it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(f"{json.dumps(report, indent=1)}\n".encode())
