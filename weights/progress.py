"""Showing how far a download is."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .transfer import Progress


@contextmanager
def reporter(progress: bool | Progress, label: str) -> Iterator[Progress]:
    """A `report(done, total)` in bytes; True draws a bar on a terminal's standard error, False is silent."""
    if callable(progress):
        yield progress
    elif progress and sys.stderr.isatty():
        from rich.console import Console  # a tenth of a second, for bars only
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(label, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)
    else:
        yield lambda done, total: None
