"""The table of counted loops: what is counted, its cells and the walls they name."""

import csv

import pytest
from foveal.kernels.tools import compile_report, loop_table


def loop(share: float, *, operator="window", kernel="forward", head_dim=64, arch="sm_90", programs=2, **units) -> dict:
    """A line of the CSV."""
    counts = {"tensor": 100, "special": 0, "float32": 0, "integer": 0, "memory": 0, "issue": 0} | units
    head = {"operator": operator, "kernel": kernel, "grid": "7x7", "head_dim": head_dim, "arch": arch}
    return dict.fromkeys(loop_table.COLUMNS, "") | head | counts | {"programs": programs, "share": share}


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, loop_table.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("units", "programs", "letter"),
    [
        ({"special": 30}, 4, "e"),
        ({"float32": 300}, 8, "f"),
        ({"integer": 120}, 4, "i"),
        ({"issue": 200}, 4, "n"),
        ({"issue": 90}, 1, "p"),
    ],
)
def test_the_wall_is_the_busiest_unit_or_too_few_programs(units, programs, letter):
    row = {name: str(x) for name, x in loop(0.5, programs=programs, **units).items()}
    assert loop_table.wall(row) == letter
    assert letter in loop_table.WALLS


def test_page_shows_best_and_masked_loops_before_and_after(tmp_path):
    before = write(tmp_path / "before.csv", [loop(0.3, issue=300)])
    after = [loop(0.9), loop(0.4, issue=250), loop(0.7), loop(1.0, head_dim=128, arch="sm_80")]
    text = loop_table.page(before, write(tmp_path / "after.csv", after))
    assert "| kernel | head dim | sm_80 | sm_90 |" in text
    assert "| forward | 64 | – | 0.30n → 0.90, 0.40n |" in text
    assert "| forward | 128 | 1.00 | – |" in text


def test_loops_without_products_are_left_out(tmp_path):
    rows = [loop(0.9), loop(0.0, tensor=0)]
    text = loop_table.page(write(tmp_path / "a.csv", []), write(tmp_path / "b.csv", rows))
    assert "| forward | 64 | 0.90 |" in text


@pytest.mark.parametrize("operator", compile_report.OPERATORS)
def test_every_kernel_and_head_dim_is_counted_once(operator):
    variants = list(compile_report._variants(operator, "sm_90"))
    plain = {(v.kernel, v.head_dim) for v in variants if v.dtype == "bf16" and v.flags in loop_table.FLAGS}
    numbers = loop_table.picked(operator, "sm_90")
    assert {(variants[n].kernel, variants[n].head_dim) for n in numbers} == plain
    keys = [(variants[n].kernel, variants[n].head_dim, variants[n].grid) for n in numbers]
    assert len(keys) == len(set(keys))


def test_count_goes_on_where_it_stopped(tmp_path, monkeypatch):
    asked = []

    def counted(operator, arch, number):
        asked.append((operator, arch))
        row = loop(0.5, operator=operator, arch=arch)
        return [compile_report.LoopRow(**{name: row[name] for name in loop_table.COLUMNS})]

    monkeypatch.setattr(compile_report, "count_loops", counted)
    monkeypatch.setattr(loop_table, "picked", lambda operator, arch: [0])
    path = tmp_path / "loops.csv"
    for operators in (["window"], ["window", "agent"]):
        assert loop_table.main(["count", str(path), "--arch", "sm_90", "--operator", *operators]) == 0
    assert asked == [("window", "sm_90"), ("agent", "sm_90")]
    assert [row["operator"] for row in loop_table.read(path)] == ["window", "agent"]
