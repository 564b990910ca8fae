"""Run benchmarks: verify, measure in turns, print each case, store the CSV, compare with the stored rows.

A benchmark with wrong results is not measured. A provider that cannot run gives its reason. Rows are written case by
case, so that an interrupted run keeps them; rows of other subjects stay in the CSV.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from . import clock, compare, records, roofline
from .benchmark import Benchmark, Call, Maker, Metric, SkippedError, WrongResultError, dtype_name
from .records import Row

SLOWEST_CALL = 20.0  # seconds; providers with slower calls are skipped
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest value


@dataclass
class Outcome:
    """Rows of a run, regressions against the stored rows, and reasons of what did not run."""

    rows: list[Row] = field(default_factory=list)
    regressions: list[compare.Change] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Runner:
    """Options of a run.

    Attributes:
        device: device of the calls.
        only: words that the text "kernel case dtype mode provider" must contain for a provider to be measured; a word
            after a minus must not be contained.
        rounds: timed calls per provider.
        results: folder of the CSV files and pictures.
        console: console of the output.
    """

    device: torch.device
    only: str = ""
    rounds: int = 9
    results: Path = records.RESULTS
    console: Console = field(default_factory=partial(Console, width=150))

    def selected(self, benchmark: Benchmark) -> list[tuple[Any, str, dict[str, Maker]]]:
        """Cases with their mode and the makers of the selected providers."""
        found = []
        for case in benchmark.cases(self.device, everything=bool(self.only)):
            for mode in benchmark.modes:
                makers = benchmark.makers(case, mode, self.device, everything=bool(self.only))
                head = f"{case.kernel} {case.name} {dtype_name(case)} {mode}"
                chosen = {name: make for name, make in makers.items() if matches(f"{head} {name}", self.only)}
                if chosen:
                    found.append((case, mode, chosen))
        return found

    def run(self, benchmarks: Sequence[Benchmark]) -> Outcome:
        outcome = Outcome()
        for benchmark in benchmarks:
            if selected := self.selected(benchmark):
                self._run_one(benchmark, selected, outcome)
        return outcome

    def _run_one(self, benchmark: Benchmark, selected: list, outcome: Outcome) -> None:
        self.console.rule(f"{benchmark.title} on {records.name_of(self.device)}")
        try:
            cases = dict.fromkeys(case for case, _, makers in selected if makers.keys() & set(benchmark.our_names))
            for number, case in enumerate(cases, 1):
                with self.console.status(f"verifying {number}/{len(cases)}: {case.kernel} {case.name}"):
                    benchmark.verify(case, self.device)
        except Exception as error:  # a benchmark that fails does not stop the others
            if not isinstance(error, WrongResultError):
                self.console.print_exception()
            outcome.refused.append(f"{benchmark.name}: {error}")
            self.console.print(f"[red]refused[/]: {escape(outcome.refused[-1])}")
            return
        path = records.file_of(benchmark.name, records.name_of(self.device), self.results)
        stored = records.read(path)
        rows: list[Row] = []
        for number, (case, mode, makers) in enumerate(selected, 1):
            what = f"{number}/{len(selected)}: {case.kernel} {case.name} {dtype_name(case)}, {mode}"
            metrics = self._measure(benchmark, case, mode, makers, what)
            environment = records.environment(self.device, self.rounds)
            found = [self._row(case, mode, metric, environment) for metric in metrics]
            rows += found
            changes = list(compare.changes(stored, found))
            outcome.regressions += [change for change in changes if change.is_regression]
            self._print(benchmark, what, found, changes)
            records.write(records.merge(stored, rows), path)
        rows += benchmark.conclude(rows)
        for row in rows:
            if row.metric == "exponent":
                self.console.print(f"{row.kernel}, {row.mode}, {row.provider}: time grows as tokens^{row.p50:.2f}")
        outcome.rows += rows
        merged = records.merge(stored, rows)
        records.write(merged, path)
        if merged:
            benchmark.plot(merged, path.with_suffix(".png"))
        self.console.print(f"wrote {path} and {path.with_suffix('.png')}")

    def _measure(self, benchmark: Benchmark, case: Any, mode: str, makers: dict[str, Maker], what: str) -> list[Metric]:
        torch.compiler.reset()  # graphs of the previous case would count towards the recompilation limit
        with self.console.status(what) as status:
            calls = self._calls(benchmark, case, makers, status)
            ticks = lambda done: status.update(f"{what}: round {done + 1}/{self.rounds}")  # noqa: E731
            metrics = list(clock.measure(calls, self.device, self.rounds, ticks))
        if not metrics:
            return []
        metrics += list(benchmark.derive(case, mode, metrics, self.device))
        return metrics + self._floors(benchmark, case, mode, metrics)

    def _calls(self, benchmark: Benchmark, case: Any, makers: dict[str, Maker], status) -> dict[str, Call]:
        """Calls that run, each run once and checked for agreement."""
        calls: dict[str, Call] = {}
        ours: object = None
        for name, make in makers.items():
            status.update(f"{case.kernel} {case.name}: first call of {name}")
            try:
                call = make()
                result = call()
                if name in benchmark.our_names and ours is None:
                    ours = result
                elif ours is not None and benchmark.same_result(name):
                    check_agreement(result, ours, case.dtype)
                if (slow := clock.seconds(call, self.device)) > SLOWEST_CALL:
                    raise SkippedError(f"takes {slow:.0f} s a call")
                calls[name] = call
            except SkippedError as why:
                self.console.print(f"  [dim]{case.name}: no {name}: {why}[/]")
            except Exception as error:  # a provider may fail in any way; the others still run
                first = str(error).strip().splitlines() or [""]
                why = escape(f"{type(error).__name__}: {first[0][:160]}")
                self.console.print(f"  [dim]{case.name}: no {name}: {why}[/]")
        return calls

    def _floors(self, benchmark: Benchmark, case: Any, mode: str, metrics: Sequence[Metric]) -> list[Metric]:
        work = benchmark.work(case, mode)
        peak = roofline.peak_of(self.device, case.dtype, records.name_of(self.device)) if work else None
        if work is None or peak is None:
            return []
        floor = roofline.floor(work, peak, dtype_name(case))
        found = [
            Metric("roofline", "compute floor", "ms", floor.compute),
            Metric("roofline", "memory floor", "ms", floor.memory),
            Metric("roofline", "floor", "ms", floor.time),
        ]
        timed = [m for m in metrics if m.metric == "time"]
        return found + [Metric(m.provider, "measured/floor", "x", m.p50 / floor.time) for m in timed]

    def _row(self, case: Any, mode: str, metric: Metric, environment: dict[str, Any]) -> Row:
        values: dict[str, Any] = metric._asdict()
        return Row(kernel=case.kernel, mode=mode, case=case.name, dtype=dtype_name(case), **values, **environment)

    def _print(self, benchmark: Benchmark, what: str, rows: Sequence[Row], changes: Sequence[compare.Change]) -> None:
        found = {(row.provider, row.metric): row for row in rows}
        ratios = {change.new.provider: change for change in changes if change.new.metric == "time"}
        ours = next((found[name, "time"].p50 for name in benchmark.our_names if (name, "time") in found), None)
        floor = found.get(("roofline", "floor"))
        title = what + (f"; floor {floor.p50:.3g} ms" if floor else "")
        if not rows:
            return
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for name in ("provider", "ms", "20-80 %", "MiB", "over ours", "over floor", "over stored"):
            table.add_column(name, justify="left" if name == "provider" else "right", min_width=10)
        for row in rows:
            if row.metric != "time":
                continue
            memory, above = found.get((row.provider, "memory")), found.get((row.provider, "measured/floor"))
            change = ratios.get(row.provider)
            table.add_row(
                row.provider,
                f"{row.p50:.4g}",
                f"{row.p20:.4g}-{row.p80:.4g}",
                f"{memory.p50:.4g}" if memory else "-",
                f"{row.p50 / ours:.2f}x" if ours else "-",
                f"{above.p50:.2f}x" if above else "-",
                (f"[red]{change.ratio:.2f}x[/]" if change.is_regression else f"{change.ratio:.2f}x") if change else "-",
            )
        self.console.print(table)


def matches(text: str, words: str) -> bool:
    """Return whether a text contains all words, and no word that follows a minus."""
    return all(word[1:] not in text if word[0] == "-" else word in text for word in words.split())


def check_agreement(result: object, ours: object, dtype: torch.dtype) -> None:
    """Raise SkippedError if a provider does not agree with this project's result."""
    as_tuple = lambda x: x if isinstance(x, tuple) else (x,)  # noqa: E731
    for found, expected in zip(as_tuple(result), as_tuple(ours), strict=True):
        assert isinstance(found, Tensor) and isinstance(expected, Tensor)
        error = float((found - expected).abs().max() / expected.abs().max())
        if found.shape != expected.shape or not error <= AGREEMENT[dtype]:
            raise SkippedError(f"its result differs from ours by {error:.2g} of the largest value")
