"""Prints a layer's time on the host, without its kernels: PYTHONPATH=. python tests/layers/ptx/host_time.py

Forward and backward of MABN with a ReLU, relative to `nn.BatchNorm2d` and `nn.ReLU` in the same round.
The layer takes the way of a GPU (door, plan, allocation, launch, autograd) with tensors on the CPU and a
driver that does nothing; only the queries of the CUDA runtime (device, stream, capture) are left out.
BatchNorm runs on the CPU on activations so small (2x64x2x2) that calls, not numbers, take the time.
"""

import statistics
import time

import gpu
import torch
from torch import nn

from mabn_d2.layers import MABN2d
from mabn_d2.layers.ops import dispatch, triton_launch, triton_ops

ROUNDS, STEPS = 31, 200


def accept_cpu(*tensors, split_batch=False):
    """The checks of `triton_ops.unsupported`, with the CPU in the place of the GPU."""
    device = tensors[0].device
    for x in tensors:
        if not x.is_cpu or x.device != device or x.dtype not in triton_ops.DTYPES:
            return "not on the CPU"
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            return "not dense"
    return None


def microseconds(modules, x, dy):
    leaves = [x, *(parameter for module in modules for parameter in module.parameters())]
    begin = time.process_time()
    for _ in range(STEPS):
        for leaf in leaves:  # as optimizers do; and sums of what no kernel has written may be slow
            leaf.grad = None
        y = x
        for module in modules:
            y = module(y)
        y.backward(dy)
    return (time.process_time() - begin) / STEPS * 1e6


def main():
    torch.set_num_threads(1)
    triton_launch.Launch.__call__ = gpu.launch_without_checks
    gpu.execute(False)
    dispatch._fastest = lambda device_type: (triton_ops, None)
    triton_ops.unsupported = accept_cpu
    x, dy = torch.randn(2, 64, 2, 2, requires_grad=True), torch.randn(2, 64, 2, 2)
    batch_norm = nn.BatchNorm2d(64), nn.ReLU(inplace=True)
    for name, split in ("ordinary", {}), ("split", {"split_batch": True}):
        mabn = (MABN2d(64, batch_size=2, activation="relu", **split),)
        for modules in batch_norm, mabn:
            microseconds(modules, x, dy)
        rounds = [
            (microseconds(batch_norm, x, dy), microseconds(mabn, x, dy)) for _ in range(ROUNDS)
        ]
        ratios = sorted(b / a for a, b in rounds)
        quartiles = statistics.quantiles(ratios, n=4)
        print(
            f"{name}: BatchNorm + ReLU {min(a for a, _ in rounds):.0f} us, MABN + ReLU "
            f"{min(b for _, b in rounds):.0f} us (least of {ROUNDS}); ratio {quartiles[1]:.2f} "
            f"(quartiles {quartiles[0]:.2f}-{quartiles[2]:.2f})"
        )


if __name__ == "__main__":
    main()
