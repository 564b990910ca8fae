"""Toy steps of a first hour, whose processes end in every way; light to import, as runs of them are killed in tests."""

import sys
from pathlib import Path

from benchmarks.first_hour import verdict
from benchmarks.first_hour.plan import Finding, Goal, Run, Step, result_text

ENDS = {  # what the process of a toy step does, given its folder
    "passes": result_text("k", "passed", "", 1.0, Finding(["a note"], [Goal("speed", 2.0, 2.5)], ["a table: x"])),
    "is wrong": result_text("k", "failed", "off by 3", 1.0, Finding()),
    "cannot": result_text("k", "skipped", "no such tool", 0.0, Finding()),
    "crashes": "import os; print('illegal memory access', flush=True); os.abort()",
    "hangs": "import time; time.sleep(60)",
}


def toy(name: str, does: str = "passes", worth: int = 1, **options) -> Step:
    return Step(name, worth, options.pop("seconds", 0.01), lambda context: Finding(), f"{does}?", "nothing", **options)


class Toys:
    """A run of toy steps, whose processes are what `ENDS` says of their question; `begun` lists them in order."""

    def __init__(self, folder: Path, steps, *, key: str = "k", stored=(), **options):
        self.begun: list[str] = []
        self.folder = folder
        self.run = Run(steps, folder=folder, key=key, command=self.command, records=stored, save=self.save, **options)

    def command(self, step: Step, work: Path) -> list[str]:
        self.begun.append(step.name)
        does = ENDS[step.question.removesuffix("?")]
        if does.startswith("{"):
            does = f"open({str(work / 'result.json')!r}, 'w').write({does!r})"
        return [sys.executable, "-S", "-c", does]

    def save(self, found) -> None:
        verdict.save(self.folder, {"device": "a toy"}, self.run.steps, found)

    def go(self, minutes: float = 1.0) -> dict[str, str]:
        self.run.go(minutes)
        return {name: record.status for name, record in self.run.records.items()}
