"""The model table of the documentation."""

from pathlib import Path

import pytest
from foveal.weights import load_manifest
from foveal.zoo.table import markdown

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
STATED = {name: e.metrics["gflops"] for name, e in load_manifest().entries.items() if "gflops" in e.metrics}


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run: python -m foveal.zoo.table docs/models.md"


@pytest.mark.parametrize("name", STATED)
def test_multiply_accumulates_are_those_the_authors_state(name):
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    macs = {f"{cells[0].strip('|` ')}.{cells[1].strip('`')}": float(cells[3]) for cells in rows}
    assert abs(macs[name] - STATED[name]) <= 0.05 + 0.01 * STATED[name]
