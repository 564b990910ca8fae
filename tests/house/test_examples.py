"""The notebooks of `examples/` run from top to bottom in a new folder; lines with `!foveal` run as processes."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def code(cells: list[dict]) -> list[str]:
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_there_are_notebooks_and_they_hold_no_outputs():
    assert len(NOTEBOOKS) >= 3
    for path in NOTEBOOKS:
        cells = read(path)
        assert cells[0]["cell_type"] == "markdown" and cells[0]["source"][0].startswith("# "), path.name
        assert not any(cell.get("outputs") for cell in cells), path.name


def run_shell(line: str, namespace: dict) -> None:
    words = [
        re.sub(r"\{(\w+)\}", lambda name: str(namespace[name[1]]), word)
        for word in shlex.split(line.replace("\\\n", " "))
    ]
    assert words[0] == "foveal", line
    run = subprocess.run([sys.executable, "-m", "foveal.cli", *words[1:]], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "notebook"}
    for cell in code(read(path)):
        if cell.startswith("!"):
            run_shell(cell[1:], namespace)
        else:
            exec(compile(cell, path.name, "exec"), namespace)
