"""A table and a picture that compare the jobs of a sweep; both grow with every job that ends."""

from __future__ import annotations

import csv
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from hydra.conf import HydraConf
from omegaconf import DictConfig
from rich.table import Table

from .checkpoint import replacing
from .console import console, tell
from .explain import JobError, explain, print_trace, wants_sentences
from .plots import plot_comparison


def metric_mode(config: DictConfig) -> str:
    """Direction of `config.metric`: "max" if jobs with more of it are better, else "min".

    As `config.metric_mode` says, else as the callback that monitors the same quantity, of whatever split, does:
    `test/acc1` goes the way of a checkpoint of the best `val/acc1`.

    Raises:
        ValueError: neither says it.
    """
    accepted = "pass metric_mode=max or metric_mode=min"
    if config.metric_mode is not None:
        if config.metric_mode not in ("max", "min"):
            raise ValueError(f"metric_mode={config.metric_mode!r} is not known: {accepted}")
        return config.metric_mode
    quantity = config.metric.split("/")[-1]
    for callback in (config.callbacks or {}).values():
        if callback and "mode" in callback and str(callback.get("monitor")).split("/")[-1] == quantity:
            return callback.mode
    raise ValueError(
        f"metric={config.metric!r} is monitored by no callback that says whether more is better: {accepted}"
    )


def _what_differs(rows: list[dict[str, str]]) -> list[str]:
    """For each job the overrides that not all jobs share."""
    overrides = [shlex.split(row["overrides"]) for row in rows]
    shared = set.intersection(*map(set, overrides))
    names = [" ".join(item for item in own if item not in shared) for own in overrides]
    return [name or f"job {row['job']}" for name, row in zip(names, rows, strict=True)]


@contextmanager
def go_on_after_failure(job: HydraConf) -> Iterator[None]:
    """Tells of an error inside at once and by the number of the job; Hydra runs the other jobs, then raises it.

    Raises:
        JobError: with the sentence for the end of the sweep.
    """
    try:
        yield
    except Exception as error:
        if not wants_sentences():
            raise
        sentence = explain(error)
        if sentence is None:
            print_trace(error)
        own = [item.lstrip("+") for item in job.overrides.task if item not in sys.argv]
        failed = f"job {job.job.num} ({' '.join(own)}) of the sweep failed: {sentence or 'its traceback is above'}"
        tell(failed)
        table = Path(job.sweep.dir) / "comparison.csv"
        raise JobError(failed, table=table, status=1 if sentence is None else 2) from error


def record_job(job: HydraConf, *, metric: str, mode: str, value: float, minutes: float) -> None:
    """Adds a job to the sweep's `comparison.csv`, redraws `comparison.png` and prints the table, best first.

    Args:
        job: Hydra's configuration of the job that ended.
        metric, value: what is compared; jobs that diverged to NaN come last.
        mode: "max" or "min", the better direction.
        minutes: that the job took.

    Raises:
        ValueError: the jobs before were compared by another metric.
    """
    folder = Path(job.sweep.dir)
    path = folder / "comparison.csv"
    with FileLock(folder / ".comparison.lock"):
        rows = []
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        if rows and metric not in rows[0]:
            raise ValueError(f"metric={metric!r} is not in {path}: pass one metric=NAME that all jobs of a sweep have")
        result = {metric: f"{value:.6g}", "minutes": f"{minutes:.2f}"}
        overrides = shlex.join(item.lstrip("+") for item in job.overrides.task)
        rows.append({"job": str(job.job.num), "overrides": overrides} | result)
        sign = 1 if mode == "min" else -1
        rows.sort(key=lambda row: (math.isnan(float(row[metric])), sign * float(row[metric])))
        with replacing(path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        names = _what_differs(rows)
        values = [float(row[metric]) for row in rows]
        plot_comparison(names, values, metric=metric, mode=mode, path=folder / "comparison.png")
    table = Table(title="Sweep so far")
    for column in ("job", "what differs", metric, "minutes"):
        table.add_column(column)
    for name, row in zip(names, rows, strict=True):
        table.add_row(row["job"], name, row[metric], row["minutes"])
    console().print(table, soft_wrap=False)
    console().print(str(folder / "comparison.png"))
