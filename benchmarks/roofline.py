"""Lower bounds of the time of a call: FLOPs over peak FLOP/s, bytes over peak bandwidth.

Peaks of GPUs come from data sheets (dense, without sparsity). Peaks of a CPU are measured by a matrix product and a
copy. FLOPs and bytes are those of the operators' `cost.py`: visible pairs, and each operand moved once.
"""

import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from .benchmark import Work


class Peak(NamedTuple):
    """Peak FLOP/s by dtype, and bandwidth in bytes/s."""

    flops: dict[str, float]
    bytes: float


class Floor(NamedTuple):
    """Lower bounds of a call in ms, by FLOPs and by bytes."""

    compute: float
    memory: float

    @property
    def time(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        return "compute" if self.compute >= self.memory else "memory"


def _half(peak: float, *, tf32: float, float32: float, memory: float) -> Peak:
    # float32 products run on matrix units as three of TF32, which can be quicker than those of the vector units
    return Peak({"bfloat16": peak, "float16": peak, "float32": max(float32, tf32 / 3)}, memory)


HOPPER = {"tf32": 494.7e12, "float32": 66.9e12}
PEAKS = {  # by a part of the device's name; from NVIDIA's and AMD's data sheets
    "H200": _half(989.4e12, **HOPPER, memory=4.8e12),
    "H100 80GB HBM3": _half(989.4e12, **HOPPER, memory=3.35e12),
    "A100-SXM4-80GB": _half(312e12, tf32=156e12, float32=19.5e12, memory=2.039e12),
    "MI300X": _half(1307.4e12, tf32=653.7e12, float32=163.4e12, memory=5.3e12),
}


def _best(call: Callable[[], object], times: int = 5) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


@lru_cache
def measured_peak(dtype: torch.dtype, threads: int, side: int = 2048, elements: int = 1 << 26) -> Peak:
    """Measured peak of this CPU with the current number of threads; `threads` keys the cache.

    Args:
        side: side of the multiplied matrices.
        elements: copied float32 numbers, more than fit into caches.
    """
    a, b = torch.randn(2, side, side).to(dtype)
    source, target = torch.zeros(elements), torch.zeros(elements)
    flops = 2 * side**3 / _best(lambda: a @ b)
    return Peak({str(dtype)[6:]: flops}, 2 * source.nbytes / _best(lambda: target.copy_(source)))


def peak_of(device: torch.device, dtype: torch.dtype, name: str) -> Peak | None:
    """Peaks of a device; None for a GPU that the table does not hold."""
    if device.type == "cpu":
        return measured_peak(dtype, torch.get_num_threads())
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def floor(work: Work, peak: Peak, dtype: str) -> Floor:
    return Floor(1e3 * work.flops / peak.flops[dtype], 1e3 * work.bytes / peak.bytes)
