"""The page of stored results: where ours is faster, and where it is slower.

Everything on it comes from the CSV files in `benchmarks/results/`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import records
from .benchmark import Benchmark
from .records import Row
from .suites import REGISTRY

INTRO = """# Benchmarks

Measured, never estimated: each number comes from a CSV file in `benchmarks/results/`, which holds every provider, the
20th and 80th percentile, the versions, the date and the commit.

```console
$ python -m benchmarks run --suite kernels       # from a checkout; also scaling, models, video
$ python -m benchmarks list                      # cases, whose shapes they have, providers
$ python -m benchmarks run --only "window 56x56 -backward" --rounds 30
$ python -m benchmarks compare OLD.csv NEW.csv --strict
$ python -m benchmarks report docs/benchmarks.md # this page
```

- Providers run in turns, round by round, so that a busy machine slows them alike; times are medians. Memory is the peak
  of a call beyond its inputs and results.
- *Ours* is the better of eager and compiled. *Fastest other* is the fastest of what else was measured: other ways to
  compute the same, and dense attention, which computes more than was asked for but is what one would use instead.
- Before it is timed, an operator is compared with its float64 reference, outputs and gradients; a wrong one is refused.
- *Over floor* is the time over the least that products or memory allow on that device, by the FLOPs and bytes of the
  operator's cost model. The README of each folder in `kernels/` has the floors on an H200. A CPU's peaks are measured in
  the run; tensors that stay in its caches can be moved faster than the copy that is the yardstick.
"""


class Pair(NamedTuple):
    """Our time and the one it has to beat; None where there is none."""

    ours: Row
    other: Row | None

    @property
    def ratio(self) -> float:
        return self.ours.p50 / self.other.p50 if self.other else float("nan")

    @property
    def verdict(self) -> str:
        if self.other is None:
            return "–"
        return f"{1 / self.ratio:.2f}x faster" if self.ratio < 1 else f"**{self.ratio:.2f}x slower**"


def pairs(benchmark: Benchmark, rows: Sequence[Row]) -> list[Pair]:
    """For each case and mode the best of ours and the fastest other, or each of ours that has a rival, and that."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.metric == "time":
            groups.setdefault((row.kernel, row.case, row.dtype, row.mode), []).append(row)
    found = []
    for timed in groups.values():
        if benchmark.rivals:
            best = {row.provider: row for row in sorted(timed, key=lambda r: -r.p50)}
            found += [Pair(best[x], best.get(y)) for x, y in benchmark.rivals.items() if x in best]
            continue
        ours = [row for row in timed if row.provider in benchmark.our_names]
        others = [row for row in timed if row not in ours]
        if ours:
            fastest = min(others, key=lambda r: r.p50, default=None)
            found.append(Pair(min(ours, key=lambda r: r.p50), fastest))
    return found


def stored(results: Path = records.RESULTS) -> dict[str, list[tuple[Benchmark, Path, list[Row]]]]:
    """Benchmarks with their CSV by the name of the device, in the order of the registry."""
    by_device: dict[str, list[tuple[Benchmark, Path, list[Row]]]] = {}
    for benchmark in REGISTRY:
        for path in sorted(results.glob(f"{benchmark.name}_*.csv")):
            if rows := records.read(path):
                by_device.setdefault(rows[0].device, []).append((benchmark, path, rows))
    return dict(sorted(by_device.items()))


def _table(benchmark: Benchmark, rows: Sequence[Row]) -> list[str]:
    found = {(*row.subject, row.metric): row.p50 for row in rows}
    several = len({row.kernel for row in rows}) > 1
    lines = ["| case | mode | ours, ms | fastest other, ms | ours is | over floor | MiB | MiB of the other |"]
    lines += ["| --- | --- | --: | --: | --- | --: | --: | --: |"]
    for pair in pairs(benchmark, rows):
        ours, other = pair
        memory = [found.get((*row.subject, "memory")) if row else None for row in pair]
        floor = found.get((*ours.subject, "measured/floor"))
        cells = [f"`{ours.kernel + ' ' if several else ''}{ours.case}`", ours.mode]
        cells += [f"{ours.p50:.4g} ({ours.provider})", f"{other.p50:.4g} ({other.provider})" if other else "–"]
        cells += [pair.verdict, f"{floor:.1f}x" if floor else "–"]
        cells += ["–" if x is None else f"{x:.3g}" for x in memory]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _losses(found: Sequence[Pair]) -> str:
    compared = [pair for pair in found if pair.other]
    lost = sorted((pair for pair in compared if pair.ratio > 1), key=lambda p: -p.ratio)
    text = f"Ours is faster in {len(compared) - len(lost)} of {len(compared)} comparisons."
    if lost:
        named = (f"`{p.ours.case}` {p.ours.mode} ({p.other.provider}, {p.ratio:.2f}x)" for p in lost if p.other)
        text += f" Where it is slower, worst first: {', '.join(named)}."
    return text


def _section(benchmark: Benchmark, path: Path, rows: Sequence[Row]) -> list[str]:
    dates = sorted({row.date for row in rows})
    versions = sorted({f"torch {row.torch}" for row in rows})
    lines = [f"### {benchmark.title}", "", _losses(pairs(benchmark, rows)), ""]
    powers = [row for row in rows if row.metric == "exponent"]
    for row in powers:
        lines.append(f"- {row.kernel}, {row.mode}, {row.provider}: time grows as tokens^{row.p50:.2f} ({row.case})")
    lines += [""] if powers else []
    lines += [*_table(benchmark, rows), "", f"![{benchmark.title}](images/benchmarks/{path.stem}.png)", ""]
    lines += [f"`{path.name}`: {', '.join(versions)}; {dates[0]}" + (f" to {dates[-1]}." if dates[1:] else "."), ""]
    return lines


def markdown(results: Path = records.RESULTS) -> str:
    """The whole page."""
    lines = [INTRO]
    devices = stored(results)
    if all("CPU threads" in device for device in devices):
        lines += ["Nothing here was measured on a GPU yet.", ""]
    for device, held in devices.items():
        lines += [f"## {device}", ""]
        for benchmark, path, rows in held:
            lines += _section(benchmark, path, rows)
    return "\n".join(lines).rstrip("\n") + "\n"


def draw(folder: Path, results: Path = records.RESULTS) -> None:
    """The pictures of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for held in stored(results).values():
        for benchmark, path, rows in held:
            benchmark.plot(rows, folder / f"{path.stem}.png")
