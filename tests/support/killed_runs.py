"""Run training as a process and kill it at a step."""

import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def steps_logged(runs: Path) -> int:
    """Last optimizer step that any part of the run wrote to its step log."""
    steps = [0]
    for log in runs.glob("*/*/steps/version_*/metrics.csv"):
        header, *lines = log.read_text().splitlines() or [""]
        column = header.split(",").index("step") if "step" in header.split(",") else 0
        steps += [int(line.split(",")[column]) for line in lines if line.count(",") == header.count(",")]
    return max(steps)


def kill_at(process: subprocess.Popen, runs: Path, step: int) -> bool:
    """SIGKILL once the step log reaches `step`; False if the run ended by itself before."""
    while process.poll() is None:
        if steps_logged(runs) >= step:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return process.returncode == -signal.SIGKILL
        time.sleep(0.002)
    return False


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-3000:]
