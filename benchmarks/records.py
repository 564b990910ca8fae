"""CSV of a benchmark: one row per metric, with the device and versions of the measurement.

Repeated metrics have a median and the 20th and 80th percentile, others a value in `p50` only.
"""

import csv
import datetime
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """Line of the CSV; its fields are the columns."""

    kernel: str
    provider: str
    mode: str
    metric: str
    unit: str
    case: str
    dtype: str
    p20: float | None
    p50: float
    p80: float | None
    config: str
    device: str
    torch: str
    triton: str
    date: str
    commit: str

    @property
    def band(self) -> tuple[float, float]:
        """The 20th and 80th percentile, or twice the value of a metric that was not repeated."""
        return self.p50 if self.p20 is None else self.p20, self.p50 if self.p80 is None else self.p80

    @property
    def subject(self) -> tuple[str, ...]:
        """Key of a measurement: one provider on one case in one mode."""
        return self.kernel, self.case, self.dtype, self.mode, self.provider


COLUMNS = tuple(field.name for field in fields(Row))
NUMBERS = ("p20", "p50", "p80")


def _parsed(line: dict[str, Any]) -> dict[str, Any]:
    return line | {name: float(line[name]) if line[name] else None for name in NUMBERS}


def read(path: Path) -> list[Row]:
    """Rows of a CSV; none when there is no such file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has the columns {reader.fieldnames}; expected {list(COLUMNS)}")
        return [Row(**_parsed(line)) for line in reader]


def write(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            numbers = {x: "" if getattr(row, x) is None else f"{getattr(row, x):.5g}" for x in NUMBERS}
            writer.writerow(asdict(row) | numbers)


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Old rows, with those of the same subject replaced by the new rows."""
    measured = {row.subject for row in new}
    return [row for row in old if row.subject not in measured] + list(new)


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def name_of(device: torch.device) -> str:
    """Name of the device; for a CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else []
    return f"{models[0] if models else platform.processor()} (CPU threads: {torch.get_num_threads()})"


def file_of(benchmark: str, device_name: str, results: Path = RESULTS) -> Path:
    """Path of the CSV of a benchmark on a device."""
    return results / f"{benchmark}_{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.csv"


def commit() -> str:
    """The commit of the checkout; empty for a copy without its history, or without git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except FileNotFoundError:
        return ""


def environment(device: torch.device, rounds: int) -> dict[str, Any]:
    """Columns that describe device and versions."""
    return {
        "config": f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, median of {rounds} rounds",
        "device": name_of(device),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }
