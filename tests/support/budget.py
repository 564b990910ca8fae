"""Holds the default suite to its time: prints the slowest areas and tests, and names default tests that are too slow.

With `--budget` these fail the run.

Time is processor time of a test and of the processes it waits for, fixtures included, so that a busy machine does not
fail a test. Tests that carry a marker of their own cost (`slow`, `exhaustive`, `gpu`, …) are counted and not held to
the limit.
"""

import os
from collections import defaultdict
from pathlib import Path

import pytest

LIMIT = 20.0  # seconds of processor time for a test that runs by default
FREE = ("slow", "exhaustive", "gpu", "multigpu", "network")
SHOWN = 8  # areas and tests in the summary


def processor_seconds() -> float:
    """Processor time of this process and of its ended children, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def area(nodeid: str) -> str:
    """Folder under `tests/` that a test lies in, or its file where it lies in `tests/` itself."""
    parts = Path(nodeid.split("::")[0]).parts
    return "/".join(parts[1:-1]) or parts[-1]


class Budget:
    """Measures tests where they run and sums them up where they are reported; under xdist these are two processes."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.limited: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        item.stash[STARTED] = processor_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        if call.when == "teardown":
            spent = processor_seconds() - item.stash[STARTED]
            limited = not any(item.get_closest_marker(marker) for marker in FREE)
            item.user_properties.append(("processor_seconds", (round(spent, 3), limited)))
        return (yield)

    def pytest_runtest_logreport(self, report):
        if report.when != "teardown":
            return
        spent, limited = dict(report.user_properties)["processor_seconds"]
        self.seconds[report.nodeid] = spent
        if limited:
            self.limited.add(report.nodeid)

    def over(self) -> list[str]:
        """Lines of the tests over the limit."""
        late = [name for name in sorted(self.limited) if self.seconds[name] > LIMIT]
        return [
            f"{name} took {self.seconds[name]:.1f} s of processor time; {LIMIT:.0f} s are accepted" for name in late
        ]

    def pytest_sessionfinish(self, session):
        if session.config.getoption("--budget") and self.over() and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if not self.seconds:
            return
        areas = defaultdict(float)
        for name, spent in self.seconds.items():
            areas[area(name)] += spent
        total = sum(areas.values())
        terminalreporter.section(f"processor time: {total:.0f} s in {len(self.seconds)} tests")
        for kind in (areas, self.seconds):
            for name, spent in sorted(kind.items(), key=lambda entry: -entry[1])[:SHOWN]:
                terminalreporter.line(f"{spent:7.1f} s  {name}")
            terminalreporter.line("")
        for line in self.over():
            terminalreporter.line(line, red=True)


STARTED = pytest.StashKey[float]()
