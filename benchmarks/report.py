"""Page of stored results: where the operators and models of this project are faster, and where slower.

All numbers come from the CSV files in `benchmarks/results/`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

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
  Backbones are compared one by one with timm's Swin-T and ConvNeXt-T, DiNAT-S with their small ones; sizes and accuracy
  of ours are under [Models](models.md).
- Before it is timed, an operator is compared with its float64 reference, outputs and gradients; a wrong one is refused.
- *Over floor* is the time over the least that products or memory allow on that device, by the FLOPs and bytes of the
  operator's cost model. The README of each folder in `kernels/` has the floors on an H200. A CPU's peaks are measured
  in the run; tensors that stay in its caches can be moved faster than the copy that is the yardstick.
"""


class Pair(NamedTuple):
    """Time of this project and of its rival; None without one."""

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
    """Per case and mode: the fastest provider of this project and the fastest other, or each one and its rivals."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.metric == "time":
            groups.setdefault((row.kernel, row.case, row.dtype, row.mode), []).append(row)
    found = []
    for timed in groups.values():
        if benchmark.rivals:
            best = {row.provider: row for row in timed}
            found += [Pair(best[x], best[y]) for x, y in benchmark.rivals if x in best and y in best]
            continue
        ours = [row for row in timed if row.provider in benchmark.our_names]
        others = [row for row in timed if row not in ours and "e4m3" not in row.provider]  # ours, of another error
        if ours:
            fastest = min(others, key=lambda r: r.p50, default=None)
            found.append(Pair(min(ours, key=lambda r: r.p50), fastest))
    return found


def stored(results: Path = records.RESULTS) -> dict[str, list[tuple[Benchmark, Path, list[Row]]]]:
    """Benchmarks with their CSV files by device, in the order of the registry."""
    by_device: dict[str, list[tuple[Benchmark, Path, list[Row]]]] = {}
    for benchmark in REGISTRY:
        for path in sorted(results.glob(f"{benchmark.name}_*.csv")):
            if rows := records.read(path):
                by_device.setdefault(rows[0].device, []).append((benchmark, path, rows))
    return dict(sorted(by_device.items()))


def _sources(benchmark: Benchmark) -> dict[tuple[str, str], str]:
    """Models of the shapes, by kernel and case."""
    devices = (torch.device("cpu"), torch.device("cuda"))
    return {(c.kernel, c.name): c.source for device in devices for c in benchmark.cases(device, everything=True)}


def _table(benchmark: Benchmark, rows: Sequence[Row]) -> list[str]:
    found = {(*row.subject, row.metric): row.p50 for row in rows}
    sources = _sources(benchmark)
    metric, unit, other = ("images/s", "images/s", "other") if benchmark.rivals else ("time", "ms", "fastest other")
    lines = [f"| case | shapes of | mode | ours, {unit} | {other}, {unit} | ours is | over floor | MiB | of other |"]
    lines += ["| --- | --- | --- | --: | --: | --- | --: | --: | --: |"]
    several = len({row.kernel for row in rows}) > 1
    for pair in pairs(benchmark, rows):
        ours = pair.ours
        value, memory = (
            [found.get((*row.subject, what)) if row else None for row in pair] for what in (metric, "memory")
        )
        floor = found.get((*ours.subject, "measured/floor"))
        cells = [f"`{ours.kernel + ' ' if several else ''}{ours.case}`", sources.get((ours.kernel, ours.case), "")]
        cells += [ours.mode]
        cells += [f"{x:.4g} ({_short(row)})" if row and x else "–" for row, x in zip(pair, value, strict=True)]
        cells += [pair.verdict, f"{floor:.1f}x" if floor else "–"]
        cells += ["–" if x is None else f"{x:.3g}" for x in memory]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _short(row: Row) -> str:
    """Name of a provider without the parts that all timm names share."""
    return row.provider.replace("_patch4_window7_224", "").replace("_patch16_224", "")


def _losses(found: Sequence[Pair]) -> list[str]:
    """Sentence and list of the slower cases, worst first; empty if nothing was compared."""
    compared = [pair for pair in found if pair.other]
    lost = sorted((pair for pair in compared if pair.ratio > 1), key=lambda pair: -pair.ratio)
    if not compared:
        return []
    lines = [f"Ours is faster in {len(compared) - len(lost)} of {len(compared)} comparisons"]
    lines[0] += ". It is slower here, worst first:" if lost else "."
    lines += [""] if lost else []
    for pair in lost:
        assert pair.other is not None
        who = f"{_short(pair.ours)} than {_short(pair.other)}"
        lines.append(f"- `{pair.ours.case}` {pair.ours.mode}, {who}: {pair.ratio:.2f}x")
    return [*lines, ""]


def _section(benchmark: Benchmark, path: Path, rows: Sequence[Row]) -> list[str]:
    dates = sorted({row.date for row in rows})
    versions = sorted({row.dtype for row in rows}) + sorted({f"torch {row.torch}" for row in rows})
    lines = [f"### {benchmark.title}", "", *_losses(pairs(benchmark, rows))]
    powers = [row for row in rows if row.metric == "exponent"]
    for row in powers:
        lines.append(f"- {row.kernel}, {row.mode}, {row.provider}: time grows as tokens^{row.p50:.2f} ({row.case})")
    lines += [""] if powers else []
    lines += [*_table(benchmark, rows), "", f"![{benchmark.title}](images/benchmarks/{path.stem}.png)", ""]
    lines += [f"`{path.name}`: {', '.join(versions)}; {dates[0]}" + (f" to {dates[-1]}." if dates[1:] else "."), ""]
    return lines


def _summary(devices: dict[str, list[tuple[Benchmark, Path, list[Row]]]]) -> list[str]:
    lines = ["| device | | faster | slower | most | least |", "| --- | --- | --: | --: | --: | --: |"]
    for device, held in devices.items():
        for benchmark, _, rows in held:
            if compared := [pair for pair in pairs(benchmark, rows) if pair.other]:
                slower = sum(pair.ratio > 1 for pair in compared)
                best, worst = (choose(compared, key=lambda pair: pair.ratio) for choose in (min, max))
                cells = (device, benchmark.title, len(compared) - slower, slower, best.verdict, worst.verdict)
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def markdown(results: Path = records.RESULTS) -> str:
    """The whole page."""
    lines = [INTRO]
    devices = stored(results)
    if all("CPU threads" in device for device in devices):
        lines += ["Nothing here was measured on a GPU yet.", ""]
    lines += ["## In short", "", *_summary(devices), ""]
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
