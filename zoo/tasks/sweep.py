"""A table and a picture that compare the jobs of a sweep; both grow with every job that ends."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from filelock import FileLock
from hydra.conf import HydraConf
from rich.console import Console
from rich.table import Table

from .plots import plot_comparison


def _own_overrides(job: HydraConf) -> list[str]:
    """The overrides of a job that the command line did not give to every job alike."""
    given = set(sys.argv[1:])
    return [override for override in job.overrides.task if override not in given]


def record_job(job: HydraConf, *, metric: str, value: float) -> None:
    """Adds a job to the sweep's `comparison.csv`, redraws `comparison.png` and prints the table, best first.

    Args:
        job: Hydra's configuration of the job that ended.
        metric, value: what is compared; larger is better.
    """
    folder = Path(job.sweep.dir)
    path = folder / "comparison.csv"
    with FileLock(folder / ".comparison.lock"):
        rows = []
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        rows.append({"job": str(job.job.num), "overrides": " ".join(_own_overrides(job)), metric: f"{value:.6g}"})
        rows.sort(key=lambda row: -float(row[metric]))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        names = [row["overrides"] or f"job {row['job']}" for row in rows]
        plot_comparison(names, [float(row[metric]) for row in rows], metric=metric, path=folder / "comparison.png")
    table = Table(title=f"Sweep so far, {folder}")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
