"""`python -m benchmarks`, from the root of a checkout.

Suites are imported by the commands that measure them: a first hour needs torch, triton, typer and rich.
"""

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import compare as comparison
from . import records
from .benchmark import Benchmark, dtype_name
from .first_hour.command import first_hour as run_first_hour

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(width=150)
Suite = Annotated[str, typer.Option(help="kernels, scaling, models, video, or all")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Only = Annotated[
    str,
    typer.Option(help="measure what holds these words (with a minus: does not hold) in its kernel, case, dtype, "
                      "mode or provider, also what the default leaves out on this device"),
]  # fmt: skip
Strict = Annotated[bool, typer.Option("--strict", help="exit with 1 when something became slower")]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"--device {name} cannot be used here: {reason}") from error
    return device


def _suite(name: str) -> list[Benchmark]:
    from .suites import of_suite

    try:
        return of_suite(name)
    except ValueError as error:
        raise typer.BadParameter(f"--suite: {error}") from error


def _say(regressions: list[comparison.Change], strict: bool) -> None:
    for change in regressions:
        console.print(f"[red]regression[/]: {change}")
    if regressions and strict:
        raise typer.Exit(1)


@app.command()
def run(
    suite: Suite = "kernels",
    device: Device = "auto",
    only: Only = "",
    rounds: Annotated[int, typer.Option(help="timed calls of each provider")] = 9,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to torch")] = 0,
    results: Annotated[Path, typer.Option(help="folder of the CSV files and pictures")] = records.RESULTS,
    strict: Strict = False,
) -> None:
    """Measure cases, print each one when it is done, and store the rows; exits with 1 if a result was wrong."""
    from .runner import Runner

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory prints a line at each use
    if threads:
        torch.set_num_threads(threads)
    outcome = Runner(_device(device), only, rounds, results, console).run(_suite(suite))
    if not outcome.rows and not outcome.refused:
        raise typer.BadParameter(f"nothing matches --suite {suite} --only {only!r}")
    _say(outcome.regressions, strict)
    if outcome.refused:
        raise typer.Exit(1)


@app.command("list")
def list_(suite: Suite = "all", device: Device = "auto") -> None:
    """List the cases of this device, the models their shapes come from, and the providers."""
    where = _device(device)
    table = Table("suite", "kernel", "case", "dtype", "shapes of", "providers")
    for benchmark in _suite(suite):
        for case in benchmark.cases(where, everything=True):
            names = benchmark.makers(case, benchmark.modes[0], where, everything=True)
            table.add_row(benchmark.suite, case.kernel, case.name, dtype_name(case), case.source, ", ".join(names))
    console.print(table)


@app.command()
def compare(old: Path, new: Path, strict: Strict = False) -> None:
    """Print the ratios new / old of the rows that two CSV files share."""
    for path in (old, new):
        if not path.exists():
            raise typer.BadParameter(f"{path} does not exist")
    try:
        changes = list(comparison.changes(records.read(old), records.read(new)))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{error}; expected two files of results") from error
    table = Table("kernel", "case", "dtype", "mode", "provider", "metric", "old", "new", "unit", "new/old")
    for change in changes:
        row = change.new
        values = (f"{change.old.p50:.4g}", f"{row.p50:.4g}", row.unit, f"{change.ratio:.2f}x")
        table.add_row(row.kernel, row.case, row.dtype, row.mode, row.provider, row.metric, *values)
    console.print(table)
    _say([change for change in changes if change.is_regression], strict)


@app.command()
def roofline() -> None:
    """Write the lower bounds of each kernel on an H200 into the READMEs under `kernels/`."""
    from . import floors

    for operator in floors.OPERATORS:
        typer.echo(f"kernels/{operator.folder}/README.md\n\n{floors.table(operator)}\n")


@app.command()
def report(page: Annotated[Path, typer.Argument(help="docs/benchmarks.md")]) -> None:
    """Write the page of stored results, and its pictures to images/benchmarks beside it."""
    from . import report as pages

    if not page.parent.is_dir():
        raise typer.BadParameter(f"{page.parent} is no folder")
    page.write_text(pages.markdown(), encoding="utf-8")
    pages.draw(page.parent / "images" / "benchmarks")


@app.command("first-hour")
def first_hour(
    minutes: Annotated[float, typer.Option(help="after which nothing new begins and what runs is stopped")] = 25.0,
    device: Device = "auto",
    tiny: Annotated[bool, typer.Option("--tiny", help="smallest sizes, to see that it runs; on a CPU")] = False,
    only: Annotated[str, typer.Option(help="steps whose name holds these words, and what they need")] = "",
    again: Annotated[bool, typer.Option("--again", help="also what failed before")] = False,
    listed: Annotated[bool, typer.Option("--list", help="say what would run")] = False,
    jobs: Annotated[int, typer.Option(help="steps at a time, of those that time nothing; 0: half the cores")] = 0,
    results: Annotated[Path, typer.Option(help="folder of the verdict and the rows")] = records.RESULTS,
) -> None:
    """Ask a GPU what waits for one, in the order of worth; exits with 1 if an answer is wrong."""
    kind = device if listed and device != "auto" else _device(device).type  # a list needs no such device
    code = run_first_hour(
        minutes=minutes, device=kind, tiny=tiny, only=only, again=again, listed=listed,
        jobs=jobs or max(1, (os.cpu_count() or 2) // 2), results=results, console=console,
    )  # fmt: skip
    if code:
        raise typer.Exit(code)


if __name__ == "__main__":
    app()
