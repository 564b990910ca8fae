"""The first hour: order, needs, resuming, cutting and the verdict on toy steps; slow: the command on a CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_steps import ENDS, Toys, toy
from typer.testing import CliRunner

from benchmarks import records
from benchmarks.__main__ import app
from benchmarks.first_hour import command, peers, tune, verdict
from benchmarks.first_hour.plan import Finding, Record, in_order
from benchmarks.records import Row

ROOT = Path(__file__).parents[2]
ROW = Row("neighborhood", "foveal", "forward", "time", "ms", "30x48x80 w18.24.24 h24x128", "bfloat16", 9.0, 10.0, 11.0,
          "", "a GPU", "2.14", "3.8", "2026-01-01", "abc")  # fmt: skip


def test_worth_orders_and_needs_come_first():
    steps = [toy("b", worth=1, needs=("c",)), toy("a", worth=2), toy("c", worth=2)]
    assert [step.name for step in in_order(steps)] == ["a", "c", "b"]
    with pytest.raises(ValueError, match="'a' needs \\['z'\\]"):
        in_order([toy("a", needs=("z",))])
    with pytest.raises(ValueError, match="two steps are called 'a'"):
        in_order([toy("a"), toy("a")])


def test_a_step_that_breaks_takes_nothing_with_it(tmp_path):
    ends = ("crashes", "is wrong", "cannot", "passes")
    steps = [toy(end, end, worth=9 - i) for i, end in enumerate(ends)]
    steps += [toy("needs a pass", needs=("passes",), worth=0), toy("needs a crash", needs=("crashes",), worth=0)]
    toys = Toys(tmp_path, steps, jobs=2)
    assert toys.go() == dict(zip(ends, ("failed", "failed", "skipped", "passed"), strict=True)) | {
        "needs a pass": "passed",
        "needs a crash": "skipped",
    }
    assert "needs a crash" not in toys.begun
    crash = toys.run.records["crashes"].why
    assert "killed by signal 6" in crash and "illegal memory access" in crash
    page = (tmp_path / "verdict.md").read_text()
    assert "- a table: x (passes)" in page and "reached: speed: 2.5 times, 2.0 wanted" in page
    assert page.index("## Failed") < page.index("off by 3") < page.index("## Passed")


def test_what_ended_is_not_run_twice_with_the_same_code_and_device(tmp_path):
    steps = [toy("first", worth=2), toy("wrong", "is wrong")]
    assert Toys(tmp_path, steps).go() == {"first": "passed", "wrong": "failed"}
    stored = verdict.load(tmp_path)
    again = Toys(tmp_path, [*steps, toy("new", worth=0)], stored=stored)
    again.go()
    assert again.begun == ["new"]
    only_passed = [record for record in stored if record.status != "failed"]
    anew = Toys(tmp_path, steps, stored=only_passed)
    anew.go()
    assert anew.begun == ["wrong"], "what it wrote before is no answer any more"
    other = Toys(tmp_path, steps, key="another commit", stored=stored)
    other.go()
    assert other.begun == ["first", "wrong"]


def test_time_is_kept(tmp_path):
    steps = [toy("long", worth=3, seconds=100.0), toy("hangs", "hangs", worth=2), toy("next", worth=1)]
    toys = Toys(tmp_path, steps)
    began = time.monotonic()
    assert toys.go(0.7 / 60) == {"long": "left", "hangs": "cut", "next": "left"}
    assert time.monotonic() - began < 5 and toys.begun == ["hangs"]
    again = Toys(tmp_path, [step for step in steps if step.name != "hangs"], stored=verdict.load(tmp_path))
    again.go(3.0)
    assert again.begun == ["long", "next"], "both are asked again"


def test_a_step_that_outlives_its_estimate_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.first_hour.plan.LEAST_PATIENCE", 0.3)
    toys = Toys(tmp_path, [toy("hangs", "hangs", worth=2), toy("next")])
    assert toys.go() == {"hangs": "failed", "next": "passed"}
    assert "did not end within" in toys.run.records["hangs"].why


def test_timings_run_alone(tmp_path):
    seen = []
    steps = [toy("a", worth=3), toy("b", worth=3), toy("timed", worth=2, alone=True), toy("c", worth=1)]
    toys = Toys(tmp_path, steps, jobs=2)
    before = toys.run.command

    def command(step, work):
        seen.append((step.name, [running.step.name for running in toys.run.running]))
        return before(step, work)

    toys.run.command = command
    toys.go()
    beside = dict(seen)
    assert beside["timed"] == [] and "timed" not in beside["c"] and beside["b"] == ["a"]


CUT = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {support!r}]
from toy_steps import Toys, toy
Toys(Path({folder!r}), [toy("first", worth=2), toy("hangs", "hangs")]).go()
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_keeps_what_ended(how, tmp_path):
    code = CUT.format(root=str(ROOT), support=str(ROOT / "tests" / "support"), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, env=os.environ)
    while not (tmp_path / "work" / "hangs").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(how)
    process.wait(10)
    found = {record.name: record.status for record in verdict.load(tmp_path)}
    assert found == {"first": "passed"} | ({"hangs": "cut"} if how == signal.SIGTERM else {})
    # what a step wrote after its run was killed is read by the next one
    (tmp_path / "work" / "hangs" / "result.json").write_text(ENDS["passes"])
    again = Toys(tmp_path, [toy("first", worth=2), toy("hangs", "hangs")], stored=verdict.load(tmp_path))
    assert again.go() == {"first": "passed", "hangs": "passed"} and not again.begun


def test_a_broken_verdict_is_no_verdict(tmp_path):
    (tmp_path / "verdict.json").write_text('{"records": [')
    assert verdict.load(tmp_path) == []


def row(provider: str, p50: float) -> Row:
    values = ROW.__dict__ | {"provider": provider, "p20": 0.99 * p50, "p50": p50, "p80": 1.01 * p50}
    return Row(**values)


def test_goals_take_the_fastest_rival():
    rows = [row("foveal", 10.0), row("foveal compiled", 8.0), row("dense flash", 60.0), row("dense cudnn", 40.0)]
    (goal,) = peers.goals(rows)
    assert (goal.found, goal.wanted, goal.reached) == (5.0, 4.5, True) and goal.what.endswith("over dense cudnn")
    assert peers.goals(rows[:1]) == []


def test_an_entry_changes_where_a_candidate_is_clearly_faster():
    question, finding = tune.QUESTIONS["forward 128 of neighborhoods"][0], Finding()
    tune.judge(question, "hopper", [row("shipped", 10.0), row("Size(1)", 8.0)], finding)
    assert finding.tables[0].startswith(
        'kernels/neighborhood/configs.py SIZES["hopper", "forward", 2][128]: Size(1) is'
    )
    finding = Finding()
    tune.judge(question, "hopper", [row("shipped", 10.0), row("Size(1)", 9.9)], finding)
    assert not finding.tables and len(finding.notes) == 2


def test_every_question_fits_the_tables():
    for question, changes in (*tune.QUESTIONS.values(), *tune.TINY.values()):
        assert changes
        for device in question.devices:
            try:
                made = tune.launches(question, device)
            except tune.SkippedError:
                continue
            assert len(made) > 1
            for launch in made.values():
                with launch():
                    pass


def test_candidates_of_block_lists_are_what_calls_take():
    for question, _ in tune.QUESTIONS.values():
        if question.operator == "block_sparse":
            block, most = question.mask
            sizes = dict(head_dim=question.shape[-1], itemsize=2, device="hopper", wide=False, whole=True)
            for label, launch in tune.launches(question, "hopper").items():
                with launch():
                    config = question.configs().choose(question.entry.kernel, block, block, most, **sizes)
                assert label in (tune.SHIPPED, str(config.size))


def test_the_path_is_afterwards_what_it_was():
    before = list(sys.path)
    with command.package_on_path() as folder:
        assert sys.path[0] == str(folder)
    assert sys.path == before and any(path.endswith("support") for path in before)


def test_the_command_lists_every_step_of_a_gpu(tmp_path, monkeypatch):
    from benchmarks.first_hour import command

    about = {"device": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "date": "", "commit": "c", "code": "f"}
    monkeypatch.setattr(command, "about", lambda *_: about)
    options = ["first-hour", "--list", "--device", "cuda", "--results", str(tmp_path)]
    listed = CliRunner().invoke(app, options, env={"COLUMNS": "250"})
    assert listed.exit_code == 0, listed.output
    order = ("values of agent", "memory of agent", "sanitizer memcheck", "peers of neighborhood", "tune forward 128",
             "gluon of neighborhood", "tests test_agent_gpu", "suite scaling")  # fmt: skip
    places = [listed.output.index(name) for name in order]
    assert places == sorted(places)


@pytest.mark.slow
def test_the_command_on_a_cpu(tmp_path):
    """Every kind of step in the interpreter, then nothing a second time."""
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "first-hour",
        "--device",
        "cpu",
        "--tiny",
        "--results",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "first_hour").iterdir()
    found = json.loads((folder / "verdict.json").read_text())
    assert found["about"]["commit"] == records.commit() and not found["counts"].get("failed")
    steps = [Record(**record) for record in found["records"]]
    passed = {step.name.split()[0] for step in steps if step.status == "passed"}
    assert passed >= {"values", "memory", "peers", "tune"}, "gluon and the sanitizer need a GPU"
    rows = records.read(folder / "rows.csv")
    assert {r.provider for r in rows} >= {"foveal", "unfold", "shipped"}
    began = time.monotonic()
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0
    assert json.loads((folder / "verdict.json").read_text())["records"] == found["records"]
    assert time.monotonic() - began < 60
