"""The model table of the documentation."""

from pathlib import Path

import pytest
from foveal.weights import load_manifest
from foveal.zoo.table import INTRO, TITLE, markdown, row

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
ENTRIES = load_manifest().entries
STATED = {name: entry.metrics["gflops"] for name, entry in ENTRIES.items() if "gflops" in entry.metrics}
ROWS = {".".join(cell.strip("|` ") for cell in line.split(" | ")[:2]): line
        for line in PAGE.splitlines() if line.startswith("| `")}  # fmt: skip
AGAIN = "run: python -m foveal.zoo.table docs/models.md"


def test_the_page_names_every_released_checkpoint():
    assert ROWS.keys() == ENTRIES.keys(), AGAIN
    assert PAGE.startswith(TITLE) and INTRO in PAGE, AGAIN


@pytest.mark.parametrize("name", ["natten_nat_m.shi_in1k", "natten_dinats_t.shi_in1k", "natten_vitrpb_s.shi_in1k"])
def test_rows_are_up_to_date(name):
    assert ROWS[name] == "| " + " | ".join(row(name)) + " |", AGAIN


@pytest.mark.slow
def test_the_whole_page_is_up_to_date():
    assert markdown() == PAGE, AGAIN


def test_parameters_in_the_manifest_are_those_of_our_models():
    """The manifest has them from the authors' code, the page from ours."""
    counted = {name: f"{entry.params / 1e6:.2f}" for name, entry in ENTRIES.items() if entry.params is not None}
    assert counted == {name: ROWS[name].split(" | ")[2].strip() for name in counted} and len(counted) > 50


@pytest.mark.parametrize("name", STATED)
def test_multiply_accumulates_are_those_the_authors_state(name):
    assert abs(float(ROWS[name].split(" | ")[3]) - STATED[name]) <= 0.05 + 0.01 * STATED[name]
