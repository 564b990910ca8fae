"""Share of the matrix units' peak in every hot loop, by kernel, architecture and head dimension, as CSV and as a page.

    python -m foveal.kernels.tools.loop_table count FILE.csv                     # of the kernels as they are
    python -m foveal.kernels.tools.loop_table page docs/counts.md BEFORE.csv AFTER.csv

Counted is the first size of each table in bfloat16, without a bias but where a kernel is for one. A cell is the loop of
the largest share and, where a kernel has them, that of the smallest, which masks.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import compile_report, sass

GRIDS = {  # by operator, those whose loops are counted; the first that a kernel has where none is named
    "neighborhood": ("18x24x24",),
    "block_sparse": ("4x4x8",),
    "window": ("8x7x7", "7x7"),
}
BIASED = "window", "agent"
FLAGS = "", "bias"
COLUMNS = "operator", *compile_report.LOOP_COLUMNS
WALLS = {
    "e": "exponentials",
    "f": "float32 arithmetic",
    "i": "integers and masks",
    "n": "the issue of instructions",
    "p": "programs: so few fit on an SM that one waits for its own softmax",
}
LEAST = 0.6  # shares below it name their wall
HEADING = """# Counted loops

What hot loops of every Triton kernel reach of the matrix units' peak *at most*, by counts of their machine code (see
[the hot loops](backends.md#the-hot-loops)): bfloat16, the first size of each table, the loop without a mask and, behind
the comma, the one with. Memory is left out, and nothing here was timed. An arrow leads from the count before tables had
a warp for every 16 rows ([every product once](backends.md#every-product-once)); what has none did not exist then, or is
as it was. Below 0.6 a letter names the wall:
"""


def picked(operator: str, architecture: str) -> list[int]:
    """Numbers of the variants that are counted."""
    found: dict[tuple, tuple[tuple, int]] = {}
    for number, variant in enumerate(compile_report._variants(operator, architecture)):
        if variant.dtype != "bf16" or variant.flags not in FLAGS:
            continue
        grids = GRIDS.get(operator, ())
        rank = grids.index(variant.grid) if variant.grid in grids else len(grids)
        cost = rank, variant.flags != ("bias" if operator in BIASED else "")
        key = variant.kernel, variant.head_dim, "" if grids else variant.grid
        if key not in found or cost < found[key][0]:
            found[key] = cost, number
    return [number for _, number in found.values()]


def count(path: Path, architectures: Sequence[str], operators: Sequence[str]) -> None:
    """Writes the loops, one line each; lines of what a file has stay."""
    present = {(row["operator"], row["arch"]) for row in read(path)} if path.exists() else set()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not present:
            writer.writeheader()
        for architecture in architectures:
            for operator in operators:
                if (operator, architecture) in present:
                    continue
                for number in picked(operator, architecture):
                    for row in compile_report.count_loops(operator, architecture, number):
                        values = {name: getattr(row, name) for name in compile_report.LOOP_COLUMNS}
                        writer.writerow({"operator": operator} | values)
                file.flush()
                print(operator, architecture, flush=True)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def wall(row: dict[str, str]) -> str:
    """Letter of what keeps a loop from the matrix units' peak, see `WALLS`."""
    device = sass.DEVICES[row["arch"]]
    unit = {
        "e": sass.QUARTER_RATE * float(row["special"]),
        "f": float(row["float32"]) * 32 * sass.SCHEDULERS / device.lanes,
        "i": sass.HALF_RATE * float(row["integer"]),
        "n": float(row["issue"]),
    }
    busy = max(unit.values())
    if (float(row["tensor"]) + busy) / int(row["programs"]) > max(busy, float(row["tensor"])):
        return "p"
    return max(unit, key=unit.__getitem__)


def _cells(rows: Iterable[dict[str, str]]) -> dict[tuple, str]:
    """By kernel and architecture, `0.89, 0.64` of the loops, with the wall of what is below `LEAST`."""
    loops: dict[tuple, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        if float(row["tensor"]):
            loops[*_line(row), row["arch"]].append(row)
    return {key: ", ".join(dict.fromkeys(map(_share, _ends(found)))) for key, found in loops.items()}


def _line(row: dict[str, str]) -> tuple[str, str, str, int]:
    """Operator, kernel, grid where several are counted, and head dimension."""
    grid = "" if row["operator"] in GRIDS else row["grid"]
    return row["operator"], row["kernel"], grid, int(row["head_dim"])


def _ends(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    ranked = sorted(rows, key=lambda row: -float(row["share"]))
    return ranked if len(ranked) < 2 else [ranked[0], ranked[-1]]


def _share(row: dict[str, str]) -> str:
    share = float(row["share"])
    return f"{share:.2f}" + (wall(row) if share < LEAST else "")


def page(before: Path, after: Path) -> str:
    """The page: a table an operator, a line a kernel and head dimension, a column an architecture."""
    old, new = (read(path) for path in (before, after))
    was, now = _cells(old), _cells(new)
    architectures = [name for name in sass.DEVICES if any(key[-1] == name for key in now)]
    text = [
        HEADING,
        *(f"- `{letter}`: {name}" for letter, name in WALLS.items()),
        "",
        "Written by `python -m foveal.kernels.tools.loop_table`.",
    ]
    for operator in dict.fromkeys(row["operator"] for row in new):
        lines = list(dict.fromkeys(_line(row) for row in new if row["operator"] == operator))
        kernels = list(dict.fromkeys(line[1:3] for line in lines))
        text += ["", f"## {operator.replace('_', '-').capitalize()}", ""]
        text += [f"| kernel | head dim | {' | '.join(architectures)} |", "|---|--:|" + "---|" * len(architectures)]
        for line in sorted(lines, key=lambda x: (kernels.index(x[1:3]), x[3])):
            cells = []
            for name in architectures:
                a, b = was.get((*line, name)), now.get((*line, name), "–")
                cells.append(b if a in (None, b) else f"{a} → {b}")
            if any(x != "–" for x in cells):
                kernel = ", ".join(filter(None, line[1:3]))
                text.append(f"| {kernel} | {line[3]} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m foveal.kernels.tools.loop_table", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    counting = commands.add_parser("count")
    counting.add_argument("file", type=Path)
    counting.add_argument("--arch", nargs="+", choices=sass.DEVICES, default=tuple(sass.DEVICES))
    counting.add_argument("--operator", nargs="+", choices=compile_report.OPERATORS, default=compile_report.OPERATORS)
    paging = commands.add_parser("page")
    for name in ("out", "before", "after"):
        paging.add_argument(name, type=Path)
    options = parser.parse_args(arguments)
    if options.command == "count":
        count(options.file, options.arch, options.operator)
    else:
        options.out.write_text(page(options.before, options.after))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
