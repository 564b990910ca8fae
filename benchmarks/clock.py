"""Time and peak memory of calls, measured in turns.

Providers run in turns, round by round, so a busy machine slows all of them. Each timed call follows an untimed call of
the same provider, so that caches and thread pools are its own. Memory is the peak during a call minus its result;
inputs are not counted.

A GPU is kept waiting while the host launches the timed work, so the time is the device's alone. Launch time of the host
is a separate metric. Calls that keep the host busy for longer than `MOST_LAUNCH`, as whole models do, are timed with
their launches.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from .benchmark import Call, Metric

MOST_LAUNCH = 2e-3  # seconds
CYCLES = 2e9  # of a GPU a second, or more


def host_seconds(call: Call) -> float:
    """Time until the call returns; on an idle GPU that is the launch time."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def seconds(call: Call, device: torch.device, launch: float = 0.0) -> float:
    """Time of a call. `launch` is the time the host needs to launch it."""
    if device.type == "cpu":
        return host_seconds(call)
    torch.empty(64 << 20, dtype=torch.int32, device=device).zero_()  # empty the L2 cache
    if launch < MOST_LAUNCH:
        torch.cuda._sleep(int(1.5 * launch * CYCLES))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def extra_bytes(call: Call, device: torch.device) -> int:
    """Peak memory during a call minus the memory of its result."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        peak, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        del result
        return peak - before - (after - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result: Any = call()
    now = peak = 0
    profiler: Any = profile.profiler
    records = profiler.kineto_results.events()  # allocations and, negative, frees
    for record in sorted((e for e in records if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += record.nbytes()
        peak = max(peak, now)
    kept = sum(x.untyped_storage().nbytes() for x in (result if isinstance(result, tuple) else (result,)))
    return peak - kept


def measure(
    calls: dict[str, Call], device: torch.device, rounds: int, tick: Callable[[int], None] = lambda done: None
) -> Iterator[Metric]:
    """Time (ms), launch time on a GPU (ms), and memory (MiB) of each provider.

    Args:
        calls: call of each provider, already run once.
        device: device of the calls.
        rounds: timed calls per provider.
        tick: called after each round with the number of rounds done.
    """
    times, launches = ({name: [] for name in calls} for _ in range(2))
    for done in range(rounds):
        tick(done)
        for name, call in calls.items():
            launches[name].append(host_seconds(call))
            times[name].append(seconds(call, device, launches[name][-1]))
    for name, call in calls.items():
        for metric, found in (("time", times), ("launch", launches)):
            if metric == "time" or device.type == "cuda":
                low, middle, high = (1e3 * float(x) for x in np.percentile(found[name], (20, 50, 80)))
                yield Metric(name, metric, "ms", middle, low, high)
        yield Metric(name, "memory", "MiB", extra_bytes(call, device) / 2**20)
