"""The benchmarks run, refuse wrong results, notice regressions, and what the documentation says of them is true."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import compare, floors, records, report, roofline
from benchmarks.__main__ import app
from benchmarks.benchmark import Work, WrongResultError
from benchmarks.records import Row
from benchmarks.runner import Runner, check_agreement, matches
from benchmarks.suites import OPERATORS, REGISTRY, SUITES, models, of_suite
from benchmarks.suites.cores import CORES, Cores
from benchmarks.suites.families import OURS, TOKENS, WIDE, Families
from benchmarks.suites.neighborhood import Case, Neighborhood
from benchmarks.suites.scaling import Scaling
from benchmarks.suites.scored import KINDS, Scored

ROOT = Path(__file__).parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
TINY = Case("a test", (9, 10), 3, heads=2, head_dim=8)
ROW = Row("window", "foveal", "forward", "time", "ms", "14x14", "float32", 9.0, 10.0, 11.0,
          "2 threads", "a CPU", "2.14", "3.8", "2026-01-01", "abc")  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list", "--suite", "nosuch"], "'nosuch' must be one of"),
        (["run", "--suite", "nosuch"], "'nosuch' must be one of"),
        (["list", "--device", "nosuch"], "--device nosuch cannot be used here"),
        (["compare", __file__, __file__], "expected two files of results"),
        (["compare", __file__, "nosuch.csv"], "nosuch.csv does not exist"),
        (["report", "nosuch/page.md"], "nosuch is no folder"),
    ],
)
def test_wrong_arguments_get_a_sentence(arguments, said):
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"})
    assert result.exit_code == 2 and said in result.output, (result.output, result.exception)


class Tiny(Neighborhood):
    """Neighborhood attention on one small case, without what compiles."""

    def cases(self, device, *, everything=False):
        return [TINY]

    def makers(self, case, mode, device, *, everything=False):
        made = super().makers(case, mode, device)
        return {name: made[name] for name in ("foveal", "dense flash", "unfold")}


class Wrong(Tiny):
    """Ours with an output that is a little off."""

    def ours(self, case, impl="auto"):
        right = super().ours(case, impl)
        return right if impl == "reference" else lambda **tensors: 1.0001 * right(**tensors)


class Broken(Tiny):
    """Ours does not run at all."""

    def ours(self, case, impl="auto"):
        raise TypeError("no [kernel] for this device")


class Impossible(Tiny):
    """A peer that refuses in a way of its own."""

    def eager(self, case, device):
        raise ImportError("libpeer.so: [/lib] is missing")


class Impostor(Tiny):
    """A peer that computes something else."""

    def eager(self, case, device):
        return super().eager(replace(case, dilation=2), device)


def run(benchmark, folder: Path, **options):
    console = Console(file=StringIO(), width=150)
    outcome = Runner(CPU, rounds=2, results=folder, console=console, **options).run([benchmark])
    return outcome, console.file.getvalue()


def test_the_registry_has_every_suite_and_leaves_gpu_sizes_out_on_cpu():
    assert SUITES == ("kernels", "scaling", "models", "video", "control")
    assert {b.name for b in of_suite("kernels")} == {
        "neighborhood",
        "window",
        "routing",
        "agent",
        "linear",
        "scan",
        "scored",
        "masks",
        "cores",
        "hilo",
    }
    with pytest.raises(ValueError, match="suite='kernel' must be one of"):
        of_suite("kernel")
    for benchmark in REGISTRY:
        for device in (CPU, GPU):
            cases = list(benchmark.cases(device, everything=True))
            assert len({(case.kernel, case.name, case.dtype) for case in cases}) == len(cases) > 0
    names = {case.name for case in Neighborhood().cases(GPU)}
    assert "30x48x80 w18.24.24 h24x128 s16.8.8" in names
    assert not names & {case.name for case in Neighborhood().cases(CPU)}


def test_the_commands_list_and_refuse():
    listed = CliRunner().invoke(app, ["list", "--suite", "kernels", "--device", "cpu"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0 and "BiFormer-T stage 3" in listed.output
    nothing = CliRunner().invoke(app, ["run", "--device", "cpu", "--only", "no such case"])
    assert nothing.exit_code == 2 and "nothing matches" in nothing.output


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    outcome, text = run(Tiny(), folder)
    return folder, outcome, text


def test_a_run_writes_the_csv_and_the_picture(measured):
    folder, outcome, _ = measured
    path = records.file_of("neighborhood", records.name_of(CPU), folder)
    rows = records.read(path)
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert [r.subject for r in rows] == [r.subject for r in outcome.rows] and not outcome.refused
    found = {(r.mode, r.provider, r.metric): r for r in rows}
    for mode in ("forward", "forward+backward"):
        for provider in ("foveal", "dense flash", "unfold"):
            time, floor = found[mode, provider, "time"], found[mode, "roofline", "floor"]
            assert 0 < time.p20 <= time.p50 <= time.p80
            assert found[mode, provider, "memory"].p50 >= 0
            assert found[mode, provider, "measured/floor"].p50 == pytest.approx(time.p50 / floor.p50, rel=1e-3)
    time = found["forward", "foveal", "time"]
    assert (time.case, time.dtype, time.kernel, time.unit) == ("9x10 w3 h2x8", "float32", "neighborhood", "ms")
    assert time.device == records.name_of(CPU) and time.torch == torch.__version__ and "2 rounds" in time.config


def test_each_case_is_printed_with_what_was_stored(measured):
    folder, outcome, text = measured
    assert "1/2: neighborhood 9x10 w3 h2x8 float32, forward" in text and "unfold" in text
    path = records.file_of("neighborhood", records.name_of(CPU), folder)
    stored = [replace(r, p20=1e-6, p50=1e-6, p80=1e-6) if r.metric == "time" else r for r in outcome.rows]
    records.write(stored, path)
    outcome, _ = run(Tiny(), folder, only="unfold -backward")
    assert {change.new.provider for change in outcome.regressions} == {"unfold"}
    after = records.read(path)
    assert sum(r.p50 > 1e-6 for r in after if r.metric == "time") == 1, "only what was selected is measured anew"
    assert len(after) == len(stored)


def test_words_select():
    text = "window 56x56 w7 float32 forward+backward foveal compiled"
    assert matches(text, "") and matches(text, "56x56 foveal")
    assert not matches(text, "56x56 flex") and not matches(text, "56x56 -compiled")


def test_wrong_results_are_refused(tmp_path):
    outcome, text = run(Wrong(), tmp_path)
    assert not outcome.rows and not list(tmp_path.iterdir())
    assert "refused" in text and len(outcome.refused) == 1
    assert "9x10 w3 h2x8 float32: out is off by" in outcome.refused[0]


def test_what_does_not_run_leaves_the_rest_to_be_measured(tmp_path):
    console = Console(file=StringIO(), width=150)
    outcome = Runner(CPU, "forward -backward", 1, tmp_path, console).run([Broken(), Impossible()])
    assert outcome.refused == ["neighborhood: no [kernel] for this device"]
    assert {row.provider for row in outcome.rows} == {"foveal", "dense flash", "roofline"}
    assert "no unfold: ImportError: libpeer.so: [/lib] is missing" in console.file.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("benchmark", OPERATORS, ids=lambda b: b.name)
def test_ours_and_the_written_out_form_are_held_to_the_reference(benchmark, dtype):
    case = min(benchmark.cases(CPU), key=lambda c: benchmark.work(c, "forward").flops)
    case = replace(benchmark.crop(case), dtype=dtype)
    benchmark.verify(case, CPU)
    tensors = benchmark.inputs(case, CPU)
    check_agreement(benchmark.eager(case, CPU)(**tensors), benchmark.ours(case)(**tensors), dtype)
    ours = benchmark.ours
    benchmark = type(benchmark)()
    benchmark.ours = lambda case, impl="auto": (
        ours(case, impl) if impl == "reference" else lambda **x: 1.01 * ours(case, "torch")(**x)
    )
    with pytest.raises(WrongResultError, match=f"{case.kernel} .* off by"):
        benchmark.verify(case, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_held_to_the_reference(kind):
    benchmark = Scored()
    case = replace(next(c for c in benchmark.cases(CPU) if c.kind == kind), side=6, heads=1)
    for dtype in (torch.float32, torch.float16):
        benchmark.verify(replace(case, dtype=dtype), CPU)
    tensors = benchmark.inputs(case, CPU)
    check_agreement(benchmark.eager(case, CPU)(**tensors), benchmark.ours(case)(**tensors), torch.float32)
    names = benchmark.makers(case, "forward", CPU).keys()
    assert names >= {"foveal", "foveal compiled", "eager"} and benchmark.work(case, "forward+backward").flops > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", CORES)
def test_linear_attentions_are_held_to_their_authors_operations(kernel, dtype, monkeypatch):
    benchmark, case = Cores(), replace(next(c for c in Cores().cases(CPU) if c.kernel == kernel), side=9, dtype=dtype)
    benchmark.verify(case, CPU)
    if dtype == torch.float32:  # both run, and agree
        for mode in benchmark.modes:
            made = benchmark.makers(case, mode, CPU)
            assert made.keys() >= {"foveal", "eager"} and any(x.startswith("dense") for x in made) == (
                kernel == "inline"
            )
            check_agreement(made["eager"]()(), made["foveal"]()(), dtype)  # pyright: ignore
            assert benchmark.work(case, mode).flops > 0
    monkeypatch.setattr(Cores, "ours", lambda self, case, layer: lambda **x: 1.05 * CORES[kernel].ours(layer, **x))
    with pytest.raises(WrongResultError, match=f"{kernel} .* off by"):
        benchmark.verify(case, CPU)


def test_every_family_has_its_rivals_and_its_sizes():
    benchmark, cases = Families(), list(Families().cases(CPU))
    assert [case.size for case in cases] == [224, 384, 512, 1024]
    for case in cases:
        names = benchmark.makers(case, "inference", CPU).keys()
        assert (WIDE in names) == (case.size == 224) and (set(TOKENS) <= names) == (case.size < 512)
        assert not benchmark.makers(case, "training step", CPU)
    assert {x for x, _ in benchmark.rivals} == set(benchmark.our_names) and ("inline_swin_t", WIDE) in benchmark.rivals
    assert all(timm.is_model(name) for name in OURS)
    with torch.device("meta"):
        assert models.build(WIDE, 224).layers[0].blocks[0].window_size == (56, 56)  # pyright: ignore


def test_a_peer_that_computes_something_else_is_left_out(tmp_path):
    outcome, text = run(Impostor(), tmp_path)
    assert "no unfold: its result differs from ours" in text
    assert {r.provider for r in outcome.rows} == {"foveal", "dense flash", "roofline"}


def test_regressions_need_a_ratio_and_bands_that_do_not_touch():
    def change(**values):
        return compare.Change(ROW, replace(ROW, **values))

    assert change(p50=12.0, p20=11.5, p80=13.0).ratio == pytest.approx(1.2)
    assert change(p50=12.0, p20=11.5, p80=13.0).is_regression
    assert not change(p50=12.0, p20=10.5, p80=13.0).is_regression, "bands touch"
    assert not change(p50=11.0, p20=11.0, p80=11.0).is_regression, "as much as is allowed"
    memory = replace(ROW, metric="memory", p20=None, p80=None)
    assert compare.Change(memory, replace(memory, p50=11.1)).is_regression
    assert not compare.regressions([ROW], [replace(ROW, metric="images/s", p20=30.0, p50=30.0)])
    assert not compare.regressions([ROW], [replace(ROW, dtype="bfloat16", p20=30.0, p50=30.0)])


def test_compare_exits_with_one_only_when_strict(tmp_path):
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    records.write([ROW], old)
    records.write([replace(ROW, p20=20.0, p50=21.0, p80=22.0)], new)
    lax, strict, back = (
        CliRunner().invoke(app, ["compare", *map(str, arguments)])
        for arguments in ((old, new), (old, new, "--strict"), (new, old, "--strict"))
    )
    assert (lax.exit_code, strict.exit_code, back.exit_code) == (0, 1, 0)
    assert "2.10x" in lax.output and "regression" in lax.output and "regression" not in back.output


def test_a_csv_of_another_layout_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("kernel,value\nwindow,1\n")
    with pytest.raises(ValueError, match="has the columns"):
        records.read(tmp_path / "x.csv")


def test_rows_survive_the_csv_and_new_ones_replace_old(tmp_path):
    memory = replace(ROW, metric="memory", p20=None, p80=None)
    records.write([ROW, memory], tmp_path / "x.csv")
    assert records.read(tmp_path / "x.csv") == [ROW, memory]
    newer, other = replace(ROW, p50=1.0), replace(ROW, provider="flex")
    assert records.merge([ROW, memory, other], [newer]) == [other, newer]


def test_the_exponent_of_a_line():
    names = ((64, 2.0), (128, 16.0), (256, 128.0))  # four times the tokens take eight times as long
    rows = [replace(ROW, case=f"{n}x{n} w7", p50=time) for n, time in names]
    (power,) = Scaling(()).conclude(rows)
    assert power.p50 == pytest.approx(1.5) and power.case == "4096 to 65536 tokens"


def test_floors_by_hand():
    peak = roofline.PEAKS["H200"]
    floor = roofline.floor(Work(flops=989_400_000_000, bytes=48_000_000_000), peak, "bfloat16")
    assert floor == pytest.approx((1.0, 10.0)) and (floor.time, floor.bound) == (floor.memory, "memory")
    case = Case("a test", (8, 8), 4, heads=3, head_dim=16, batch=2, dtype=torch.bfloat16)
    pairs, operand = 8 * 8 * 16, 2 * 64 * 3 * 16 * 2
    forward, both = (Neighborhood().work(case, mode) for mode in ("forward", "forward+backward"))
    assert forward == Work(4 * 16 * pairs * 6, 4 * operand + 2 * 64 * 3 * 4)
    assert both == Work(14 * 16 * pairs * 6, 12 * operand + 2 * (2 * 64 * 3 * 4))
    assert roofline.peak_of(GPU, torch.bfloat16, "NVIDIA H200") is peak
    assert roofline.peak_of(GPU, torch.bfloat16, "a GPU nobody knows") is None


def test_the_peaks_of_a_cpu_are_measured():
    peak = roofline.measured_peak(torch.float32, torch.get_num_threads(), side=256, elements=1 << 20)
    assert 1e8 < peak.flops["float32"] < 1e15 and 1e8 < peak.bytes < 1e13


@pytest.mark.parametrize("operator", floors.OPERATORS, ids=lambda operator: operator.name)
def test_the_floors_in_the_readmes_are_up_to_date(operator):
    page = (ROOT / "kernels" / operator.folder / "README.md").read_text(encoding="utf-8")
    assert floors.table(operator) in page, "run: python -m benchmarks roofline"


def test_the_report_is_up_to_date():
    page = ROOT / "docs" / "benchmarks.md"
    assert page.read_text(encoding="utf-8") == report.markdown(), "run: python -m benchmarks report docs/benchmarks.md"
    shown = {path.stem for path in (page.parent / "images" / "benchmarks").glob("*.png")}
    assert shown == {path.stem for path in records.RESULTS.glob("*.csv")}


def test_the_report_says_where_ours_loses(tmp_path):
    slow = replace(ROW, provider="dense flash", p50=5.0)
    records.write([ROW, slow, replace(ROW, case="7x7", p50=2.0), replace(slow, case="7x7")], tmp_path / "window_x.csv")
    page = report.markdown(tmp_path)
    assert "Ours is faster in 1 of 2 comparisons. It is slower here, worst first:\n\n- `14x14` forward, foveal" in page
    assert "| a CPU | Window attention | 1 | 1 | 2.50x faster | **2.00x slower** |" in page
    assert "| 5 (dense flash) | **2.00x slower** |" in page and "| 2.50x faster |" in page
    assert page.startswith(report.INTRO) and "## a CPU" in page
