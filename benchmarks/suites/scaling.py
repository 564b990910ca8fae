"""Growth of time with the number of tokens, from 4 thousand on, beside dense attention as far as it runs.

Sizes of windows and numbers of agents are fixed. So is BiFormer's number of regions, 7x7, whose cost is not linear.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import figures
from ..benchmark import Benchmark, Maker, Work
from ..operators import Operator
from ..records import Row

DENSE = "dense flash"  # the same for all, so measured with one of them


class Scaling(Benchmark):
    """Each operator on cases of its own that differ in the number of tokens only."""

    name = "scaling"
    suite = "scaling"
    title = "Time over the number of tokens"

    def __init__(self, operators: Sequence[Operator]):
        self.operators = {operator.name: operator for operator in operators}

    def cases(self, device: torch.device, *, everything: bool = False) -> Iterator[Any]:
        for operator in self.operators.values():
            yield from operator.scaling(device)

    def verify(self, case: Any, device: torch.device) -> None:
        self.operators[case.kernel].verify(case, device)

    def makers(self, case: Any, mode: str, device: torch.device, *, everything: bool = False) -> dict[str, Maker]:
        made = self.operators[case.kernel].makers(case, mode, device)
        return {name: made[name] for name in ("foveal", *((DENSE,) if case.kernel == "neighborhood" else ()))}

    def work(self, case: Any, mode: str) -> Work:
        return self.operators[case.kernel].work(case, mode)

    def conclude(self, rows: Sequence[Row]) -> Iterator[Row]:
        return exponents(rows)

    def plot(self, rows: Sequence[Row], path: Path) -> None:
        figures.lines(rows, path, title=self.title)


def exponents(rows: Sequence[Row]) -> Iterator[Row]:
    """Slope of log time over log tokens, per kernel, provider and mode."""
    series: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.metric == "time":
            series.setdefault((row.kernel, row.provider, row.mode), []).append(row)
    for timed in series.values():
        tokens = [figures.tokens_of(row) for row in timed]
        if len(set(tokens)) > 1:
            slope = np.polyfit(np.log(tokens), np.log([row.p50 for row in timed]), 1)[0]
            span = f"{min(tokens)} to {max(tokens)} tokens"
            yield replace(timed[-1], metric="exponent", unit="", case=span, p20=None, p50=float(slope), p80=None)
