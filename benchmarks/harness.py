"""What the benchmarks share: turns of timed calls, peak memory, and the CSV that records them.

A row is one metric of one provider on one case. Providers run in turns, round by round, so a busy machine slows them
alike; each timed call follows one that is not, so that caches and thread pools are its own. Memory is the peak of a
call less what it returns: it counts neither inputs nor results.
"""

import csv
import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

COLUMNS = (
    *("kernel", "provider", "mode", "metric", "unit", "case", "value", "p20", "p80"),
    *("config", "device", "torch", "triton", "date", "commit"),
)
SLOWEST_CALL = 20.0  # seconds; a provider whose call takes longer is left out
console = Console(width=150)


class SkippedError(Exception):
    """A provider does not run a case; the text says why."""


def seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.empty(64 << 20, dtype=torch.int32, device=device).zero_()  # empty the L2 cache
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak of memory during a call less what the call returns."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        peak, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        del result
        return peak - before - (after - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    now = peak = 0
    records = profile.profiler.kineto_results.events()  # allocations and, negative, frees
    for record in sorted((e for e in records if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += record.nbytes()
        peak = max(peak, now)
    kept = sum(x.untyped_storage().nbytes() for x in (result if isinstance(result, tuple) else (result,)))
    return peak - kept


def measure(
    made: dict[str, Callable[[], Callable[[], object]]], device: torch.device, rounds: int, *, what: str
) -> Iterator[dict]:
    """Rows of time (ms) and memory (MiB) of each provider; says why one is left out.

    Args:
        made: by the name of a provider, what makes its call; made only when its turn comes, and called once first.
        device: that the calls run on.
        rounds: timed calls of each.
        what: the case, for messages.
    """
    calls = {}
    for name, make in made.items():
        try:
            call = make()
            call()
            if (slow := seconds(call, device)) > SLOWEST_CALL:
                raise SkippedError(f"takes {slow:.0f} s a call")
            calls[name] = call
        except SkippedError as why:
            console.print(f"  {what}: no {name}: {why}")
        except (RuntimeError, NotImplementedError) as error:  # what a provider itself refuses
            console.print(f"  {what}: no {name}: {str(error).strip().splitlines()[0][:160]}")
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            times[name].append(1e3 * seconds(call, device))
    for name, call in calls.items():
        low, middle, high = np.percentile(times[name], (20, 50, 80))
        yield {"provider": name, "metric": "time", "unit": "ms", "value": middle, "p20": low, "p80": high}
        yield {"provider": name, "metric": "memory", "unit": "MiB", "value": extra_bytes(call, device) / 2**20}


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = (
        [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return f"{models[0] if models else platform.processor()} (CPU threads: {torch.get_num_threads()})"


def write(rows: list[dict], path: Path, *, kernel: str, device: torch.device, rounds: int) -> None:
    """The rows as CSV, with what they were measured on."""
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    common = {
        "kernel": kernel,
        "config": f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, median of {rounds} rounds",
        "device": name_of(device),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "date": datetime.date.today().isoformat(),
        "commit": revision.stdout.strip(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        for row in rows:
            numbers = {x: f"{row[x]:.5g}" for x in ("value", "p20", "p80") if x in row}
            writer.writerow(row | numbers | common)
