"""Run steps in the order of their worth inside a time, each in a process of its own, and keep what each one found.

A step that breaks takes nothing with it. The record of a step is written as a whole when the step ends, so a run may be
cut at any moment: the next one goes on with what has no record of this code on this device.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape

FINAL = ("passed", "failed", "skipped")  # a step with such a record is not run again
PATIENCE = 4  # times its estimate, and at least this many seconds, until a step is stopped
LEAST_PATIENCE = 60.0
LAST_LINES = 12  # of the output of a step that broke
Say = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """One question that a device answers.

    Attributes:
        name: of the step; words that `--only` looks for.
        worth: steps of more worth run first.
        seconds: estimate on an H200; a step that would not end in time is left for the next run.
        function: answers it in the process of the step, from a `Context`; returns a `Finding`.
        question: what is asked.
        changes: what the answer would change.
        alone: whether nothing else may run beside it, as where time is measured.
        needs: steps that must have passed; without them the answer would be worth nothing.
    """

    name: str
    worth: int
    seconds: float
    function: Callable[..., "Finding"]
    question: str
    changes: str
    alone: bool = False
    needs: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Goal:
    """A stated goal and the value that was measured; `reached` where it is kept."""

    what: str
    wanted: float
    found: float

    @property
    def reached(self) -> bool:
        return self.found >= self.wanted


@dataclass
class Finding:
    """Answer of a step: sentences, goals, and entries of tables that would change."""

    notes: list[str] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)


@dataclass
class Record:
    """How a step ended, under which code and device (`key`)."""

    name: str
    status: str  # passed, failed, skipped; or cut, left, which are tried again
    why: str
    seconds: float
    key: str
    date: str
    finding: dict[str, Any] = field(default_factory=dict)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def in_order(steps: Sequence[Step]) -> list[Step]:
    """Steps by worth; of equal worth as declared.

    Raises:
        ValueError: two steps share a name, or one needs a step that does not come before it.
    """
    ordered = sorted(steps, key=lambda step: -step.worth)
    before: set[str] = set()
    for step in ordered:
        if step.name in before:
            raise ValueError(f"two steps are called {step.name!r}")
        if missing := set(step.needs) - before:
            raise ValueError(f"step {step.name!r} needs {sorted(missing)}, which must be of more worth")
        before.add(step.name)
    return ordered


@dataclass
class Running:
    step: Step
    process: subprocess.Popen
    output: Any
    started: float
    until: float

    def stop(self) -> None:
        """End the process and everything it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.output.close()


class Run:
    """Steps of one run and their records.

    Args:
        steps: in any order.
        folder: gets `work/<step>/`, where a step writes `result.json` and its rows, and `output.txt`.
        key: code and device; records of another key are of no use.
        command: command line of the process of a step, which is to write `result.json` into the folder it is given.
        environment: of these processes; None for that of this one.
        records: those of an earlier run.
        keep: called with a step and its folder when the step ended or was cut, before its record is written.
        save: called with all records when one was added.
        say: shows a line of progress.
        jobs: steps at a time, of those that need not be alone.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        folder: Path,
        key: str,
        command: Callable[[Step, Path], list[str]],
        environment: dict[str, str] | None = None,
        records: Sequence[Record] = (),
        keep: Callable[[Step, Path], None] = lambda step, folder: None,
        save: Callable[[list[Record]], None] = lambda records: None,
        say: Say = lambda text: None,
        jobs: int = 1,
    ):
        self.steps, self.folder, self.key, self.jobs = in_order(steps), folder, key, jobs
        self.command, self.environment = command, environment
        self.keep, self.save, self.say = keep, save, say
        self.records = {record.name: record for record in records if record.key == key}
        self.running: list[Running] = []

    def go(self, minutes: float) -> None:
        """Run what has no final record until all is done or the time is up."""
        deadline = time.monotonic() + 60 * minutes
        waiting = [step for step in self.steps if not self._known(step)]
        with interrupted_by_terminate():
            try:
                while waiting or self.running:
                    for running in list(self.running):
                        if running.process.poll() is not None or time.monotonic() > running.until:
                            self._end(running, deadline)
                    waiting = self._begin(waiting, deadline)
                    time.sleep(0.02)
            finally:
                for running in list(self.running):
                    self._end(running, deadline)
                self._save()

    def _known(self, step: Step) -> bool:
        """Return whether a step has a final record, also one that an earlier run did not live to read."""
        if step.name in self.records and self.records[step.name].status in FINAL:
            return True
        result = read_json(self._folder(step) / "result.json")
        if result is None or result["key"] != self.key:
            return False
        self.keep(step, self._folder(step))
        self._record(step, result["status"], result["why"], result["seconds"], result["finding"])
        (self._folder(step) / "result.json").unlink()  # recorded: it is not read once more
        return result["status"] in FINAL

    def _folder(self, step: Step) -> Path:
        return self.folder / "work" / step.file

    def _begin(self, waiting: list[Step], deadline: float) -> list[Step]:
        """Begin what can begin, in order; returns the steps that still wait."""
        for place, step in enumerate(waiting):
            left = deadline - time.monotonic()
            unmet = [name for name in step.needs if self._status(name) != "passed"]
            pending = {r.step.name for r in self.running} | {other.name for other in waiting[:place]}
            if pending & set(step.needs):
                return waiting[place:]
            if unmet:
                whys = ", ".join(f"{name} {self._status(name) or 'was not run'}" for name in unmet)
                final = all(self._status(name) in FINAL for name in unmet)
                self._record(step, "skipped" if final else "left", f"it needs what is not there: {whys}")
            elif step.seconds > left:
                self._record(step, "left", f"about {step.seconds:.0f} s are needed, {max(left, 0):.0f} s were left")
            elif self._full(step):
                return waiting[place:]
            else:
                self._start(step, deadline)
        return []

    def _full(self, step: Step) -> bool:
        """Return whether a step must wait for those that run."""
        alone = step.alone or any(running.step.alone for running in self.running)
        return len(self.running) >= (1 if alone else self.jobs)

    def _status(self, name: str) -> str | None:
        return self.records[name].status if name in self.records else None

    def _start(self, step: Step, deadline: float) -> None:
        folder = self._folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)
        output = (folder / "output.txt").open("w")
        process = subprocess.Popen(
            self.command(step, folder), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=self.environment, start_new_session=True,
        )  # fmt: skip
        now = time.monotonic()
        until = min(deadline, now + max(LEAST_PATIENCE, PATIENCE * step.seconds))
        self.running.append(Running(step, process, output, now, until))
        self.say(f"[dim]{len(self.records)}/{len(self.steps)}[/] {escape(f'{step.name}: {step.question}')} …")

    def _end(self, running: Running, deadline: float) -> None:
        """Record how a step ended, or that it was stopped."""
        step, folder, code = running.step, self._folder(running.step), running.process.poll()
        running.stop()
        self.running.remove(running)
        seconds = time.monotonic() - running.started
        result = read_json(folder / "result.json")
        self.keep(step, folder)
        if result is not None:
            self._record(step, result["status"], result["why"], seconds, result["finding"])
            (folder / "result.json").unlink()
        elif code is not None:
            lines = (folder / "output.txt").read_text(errors="replace").strip().splitlines()[-LAST_LINES:]
            how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
            self._record(step, "failed", "\n".join([f"its process {how}:", *lines]), seconds)
        elif time.monotonic() < deadline and time.monotonic() > running.until:
            why = f"did not end within {seconds:.0f} s, {step.seconds:.0f} s were estimated"
            self._record(step, "failed", why, seconds)
        else:
            self._record(step, "cut", f"the run ended after {seconds:.0f} s of it", seconds)

    def _record(self, step: Step, status: str, why: str, seconds: float = 0.0, finding: dict | None = None) -> None:
        date = time.strftime("%Y-%m-%d %H:%M")
        self.records[step.name] = Record(step.name, status, why, round(seconds, 1), self.key, date, finding or {})
        color = {"passed": "green", "failed": "red"}.get(status, "yellow")
        first = f": {why.splitlines()[0]}" if why else ""
        self.say(f"[{color}]{status}[/] {escape(f'{step.name} ({seconds:.0f} s){first}')}")
        self._save()

    def _save(self) -> None:
        self.save([self.records[step.name] for step in self.steps if step.name in self.records])


@contextmanager
def interrupted_by_terminate() -> Iterator[None]:
    """Inside the block SIGTERM interrupts as Ctrl-C does, so that running steps are stopped and recorded."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def result_text(key: str, status: str, why: str, seconds: float, finding: Finding) -> str:
    """What a step writes into `result.json`."""
    goals = [asdict(goal) | {"reached": goal.reached} for goal in finding.goals]
    found = {"notes": finding.notes, "goals": goals, "tables": finding.tables}
    return json.dumps({"key": key, "status": status, "why": why, "seconds": seconds, "finding": found})
