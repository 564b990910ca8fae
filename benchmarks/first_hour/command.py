"""`python -m benchmarks first-hour`: find the device, run what is open, say what was found."""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import records
from . import verdict
from .context import ROOT, child_environment
from .plan import FINAL, Run, Step, read_json

SOURCES = ("kernels/**/*.py", "benchmarks/**/*.py", "tests/support/*.py", "tests/kernels/**/*.py")


def code() -> str:
    """Fingerprint of the sources that results depend on."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)}):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@contextmanager
def package_on_path() -> Iterator[Path]:
    """A folder in which this checkout is called `foveal`, also on this process' path: nothing need be installed."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "foveal").symlink_to(ROOT, target_is_directory=True)
        paths = [folder, str(ROOT / "tests" / "support")]
        before = list(sys.path)
        sys.path[:0] = paths
        try:
            yield Path(folder)
        finally:
            sys.path[:] = before


def about(device: str, environment: dict[str, str], folder: Path) -> dict[str, str]:
    """Device and versions, asked in a process of its own: this one holds no device.

    Raises:
        RuntimeError: the device does not answer.
    """
    command = [sys.executable, "-m", "benchmarks.first_hour.child", "probe", str(folder), "-", device]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    found = read_json(folder / "probe.json")
    if found is None:
        raise RuntimeError(f"device {device!r} does not answer: {done.stderr.strip().splitlines()[-1:]}")
    return {**found, "date": time.strftime("%Y-%m-%d"), "commit": records.commit(), "code": code()}


def keep_rows(step: Step, work: Path, rows: Path) -> None:
    """Merge the rows that a step wrote, however far it came, into the CSV of the run."""
    for path in sorted(work.glob("*.csv")):
        try:
            merged = records.merge(records.read(rows), records.read(path))
        except (ValueError, TypeError):  # a line that was cut
            continue
        part = rows.with_name(f"{rows.name}.part{os.getpid()}")
        records.write(merged, part)
        part.replace(rows)


def show(console: Console, steps: list[Step], known: dict[str, str]) -> None:
    """Print the steps in order, with their estimates and what is known of them."""
    table = Table("worth", "step", "s", "needs", "would change", "known")
    for step in steps:
        row = (str(step.worth), step.name, f"{step.seconds:.0f}", ", ".join(step.needs), step.changes)
        table.add_row(*row, known.get(step.name, ""))
    console.print(table)


def first_hour(
    *, minutes: float, device: str, tiny: bool, only: str, again: bool, listed: bool, jobs: int, results: Path,
    console: Console,
) -> int:  # fmt: skip
    """Run, or list, the steps that are open; returns the exit code: 1 if a step failed."""
    with package_on_path() as link, tempfile.TemporaryDirectory() as scratch:
        if importlib.util.find_spec("triton") is None:
            console.print("[red]triton is not installed[/]: there are no kernels to ask about")
            return 2
        environment = child_environment(device, link)
        try:
            info = about(device, environment, Path(scratch))
        except RuntimeError as error:
            console.print(f"[red]{error}[/]")
            return 2
        from .steps import declared  # imports the kernels, so not before the path is set

        folder = results / "first_hour" / re.sub(r"[^a-z0-9]+", "-", info["device"].lower()).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        every = declared(small=tiny)
        key = " ".join((info["code"], info["commit"], info["device"], info["torch"], info["triton"], "tiny" * tiny))

        def command(step: Step, work: Path) -> list[str]:
            head = [sys.executable, "-m", "benchmarks.first_hour.child", step.name, str(work.resolve()), key, device]
            return [*head, *(["--tiny"] if tiny else [])]

        words = only.split()
        chosen = [step for step in every if all(word in step.name for word in words)]
        needed = {name for step in chosen for name in step.needs}
        steps = [step for step in every if step in chosen or step.name in needed]
        if not steps:
            console.print(f"no step holds {only!r}")
            return 2
        names = {step.name for step in steps}
        stored = [record for record in verdict.load(folder) if record.key == key]
        stored = [r for r in stored if not (again and r.status == "failed" and r.name in names)]
        others = [record for record in stored if record.name not in names]
        run = Run(
            steps, folder=folder, key=key, command=command, environment=environment, records=stored,
            keep=lambda step, work: keep_rows(step, work, folder / "rows.csv"),
            save=lambda found: verdict.save(folder, info, every, [*found, *others]),
            say=console.print, jobs=jobs,
        )  # fmt: skip
        if listed:
            show(console, run.steps, {name: record.status for name, record in run.records.items()})
            return 0
        console.rule(f"{info['device']}, torch {info['torch']}, triton {info['triton']}, {minutes:g} minutes")
        try:
            run.go(minutes)
        except KeyboardInterrupt:
            console.print("[yellow]cut[/]: what ended is kept; the same command goes on")
        open_steps = [step.name for step in steps if run.records.get(step.name) is None
                      or run.records[step.name].status not in FINAL]  # fmt: skip
        console.print(f"{len(steps) - len(open_steps)} of {len(steps)} steps ended; {folder / 'verdict.md'}")
        return int(any(record.status == "failed" for record in run.records.values()))
