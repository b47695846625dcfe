"""Runs a benchmark: times all its cases, prints a table after each, writes the report."""

import sys
from argparse import Namespace
from collections.abc import Callable

import torch
from tqdm import tqdm

from . import measure
from .accumulation_cases import accumulation_cases
from .detector_cases import detector_cases, step_cases
from .layer_cases import inference_cases, layer_cases
from .norms import baseline
from .report import plot, table

PASSES = 8  # over activations, forward and backward of a layer; a copy makes 2


# benchmark -> function from arguments to cases
CASES = {
    "layer": layer_cases,
    "inference": inference_cases,
    "detector": detector_cases,
    "step": step_cases,
    "accumulation": accumulation_cases,
}


def run_benchmark(args: Namespace) -> dict:
    """Run the benchmark `args.what`; return the report, which is written to `args.output`.

    Args:
        args: what `mabn_d2.commands.benchmark` parses.
    """
    torch.manual_seed(0)
    results: list[dict] = []
    for case, steps in CASES[args.what](args):
        results += measure_case(args, case, steps)
        print(table(results[-len(steps) :]), flush=True)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    report = {"settings": settings, **measure.describe(args.device), "results": results}
    if args.output:
        measure.write_json(report, args.output)
        plot(report, args.output.with_suffix(".png"))
    return report


def measure_case(args: Namespace, case: dict, steps: dict[str, Callable]) -> list[dict]:
    """Measure time and memory of one case; return a row for each norm."""
    shape = "x".join(map(str, case["shape"]))
    text = f"{case['dtype']} {case['format']} {shape}, {case['threads']} threads"
    # In a log file, a line every 10 s is enough.
    every = 0.2 if sys.stderr.isatty() else 10
    total = len(steps) * (args.rounds + 2)
    with tqdm(total=total, desc=text, leave=False, mininterval=every) as bar:
        clock = measure.CLOCKS[args.clock]
        times = measure.measure(steps, args.rounds, args.round_seconds, clock, bar.update)
        peaks = {}
        for norm, step in steps.items():
            peaks[norm] = measure.memory_peak(step, args.device)
            bar.update()
    elements = torch.Size(case["shape"]).numel() * case.get("depth", 1)
    rows = []
    for norm in steps:
        row = {"depth": 1, **case, "elements": elements, "norm": norm}
        row |= measure.summarize(times[norm], times[baseline(norm, args.what, args.baseline)])
        if "copy" in steps and norm != "copy":
            share = PASSES / 2 * case["depth"]
            row["of_copy"] = share / measure.summarize(times[norm], times["copy"])["ratio"][1]
        rows.append({**row, "peak_bytes": peaks[norm]})
    return rows
