"""A table and a picture that compare the jobs of a sweep; both grow with every job that ends."""

from __future__ import annotations

import csv
from pathlib import Path

from filelock import FileLock
from hydra.conf import HydraConf
from rich.console import Console
from rich.table import Table

from .plots import plot_comparison


def _what_differs(rows: list[dict[str, str]]) -> list[str]:
    """For each job the overrides that not all jobs share."""
    overrides = [row["overrides"].split() for row in rows]
    shared = set.intersection(*map(set, overrides))
    names = [" ".join(item for item in own if item not in shared) for own in overrides]
    return [name or f"job {row['job']}" for name, row in zip(names, rows, strict=True)]


def record_job(job: HydraConf, *, metric: str, value: float, minutes: float) -> None:
    """Adds a job to the sweep's `comparison.csv`, redraws `comparison.png` and prints the table, best first.

    Args:
        job: Hydra's configuration of the job that ended.
        metric, value: what is compared; larger is better.
        minutes: that the job took.
    """
    folder = Path(job.sweep.dir)
    path = folder / "comparison.csv"
    with FileLock(folder / ".comparison.lock"):
        rows = []
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        result = {metric: f"{value:.6g}", "minutes": f"{minutes:.2f}"}
        rows.append({"job": str(job.job.num), "overrides": " ".join(job.overrides.task)} | result)
        rows.sort(key=lambda row: -float(row[metric]))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        names = _what_differs(rows)
        plot_comparison(names, [float(row[metric]) for row in rows], metric=metric, path=folder / "comparison.png")
    table = Table(title="Sweep so far")
    for column in ("job", "what differs", metric, "minutes"):
        table.add_column(column)
    for name, row in zip(names, rows, strict=True):
        table.add_row(row["job"], name, row[metric], row["minutes"])
    Console().print(table)
    Console().print(folder / "comparison.png", highlight=False, soft_wrap=True)
