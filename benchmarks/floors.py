"""Table of lower bounds in the README of each kernel: computed for an H200, not measured."""

import torch

from .benchmark import MODES, dtype_name
from .operators import Operator
from .roofline import PEAKS, floor
from .suites import OPERATORS

GPU = "H200"
HEADER = """| shapes of | case | GFLOP | MB | by products, µs | by bytes, µs | with backward: by products | by bytes |
| --- | --- | --: | --: | --: | --: | --: | --: |"""


def digits(x: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{float(f'{x:.3g}'):,.10g}"


def table(operator: Operator, gpu: str = GPU) -> str:
    """One row per case of a GPU; the higher of the two lower bounds is bold."""
    lines = [HEADER]
    for case in operator.cases(torch.device("cuda")):
        forward = operator.work(case, MODES[0])
        cells = [case.source, f"`{case.name}`", digits(forward.flops / 1e9), digits(forward.bytes / 1e6)]
        for mode in MODES:
            least = floor(operator.work(case, mode), PEAKS[gpu], dtype_name(case))
            for name in ("compute", "memory"):
                text = digits(1e3 * getattr(least, name))
                cells.append(f"**{text}**" if least.bound == name else text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


__all__ = ["OPERATORS", "table"]
