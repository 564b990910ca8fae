"""Steps that time the operators against what one would use without them, and compare with the stated goals."""

import io
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import NamedTuple

from rich.console import Console

from .. import records
from ..benchmark import SkippedError, WrongResultError
from ..records import Row
from .context import Context
from .plan import Finding, Goal

ROUNDS = 5


class Aim(NamedTuple):
    """A goal: how many times as fast as the fastest provider whose name begins so, on a case in a mode."""

    case: str
    mode: str
    rival: str
    wanted: float


AIMS = (
    Aim("30x48x80 w18.24.24 h24x128", "forward", "dense", 4.5),
    Aim("30x48x80 w18.24.24 h24x128 s16.8.8", "forward", "dense", 9.5),
    Aim("256x256 w80 h24x128", "forward", "dense", 5.5),
    Aim("256x256 w80 h24x128 s16", "forward", "dense", 9.5),
    *(Aim("56x56 w7 h2x32 b64", mode, "flex", 2.0) for mode in ("forward", "forward+backward")),
    *(Aim("28x28 w7 h4x32 b64", mode, "flex", 2.0) for mode in ("forward", "forward+backward")),
    Aim("56x56 w7 bias h3x32 b64", "forward", "partition SDPA", 2.0),
    Aim("64x64 a49 h12x32 b4", "forward", "eager", 1.5),
    Aim("256x256 h3x32 b4", "forward", "eager", 3.0),
)


def goals(rows: Sequence[Row], aims: Sequence[Aim] = AIMS) -> list[Goal]:
    """Goals of the measured cases: the fastest rival's time over that of the faster of ours."""
    found = []
    for aim in aims:
        times = {r.provider: r.p50 for r in rows if (r.case, r.mode, r.metric) == (aim.case, aim.mode, "time")}
        ours = [time for name, time in times.items() if name in ("foveal", "foveal compiled")]
        rivals = {name: time for name, time in times.items() if name.startswith(aim.rival)}
        if ours and rivals:
            name = min(rivals, key=rivals.__getitem__)
            what = f"{aim.case}, {aim.mode}: over {name}"
            found.append(Goal(what, aim.wanted, round(rivals[name] / min(ours), 2)))
    return found


def tiny(benchmark):
    """The benchmark of neighborhoods on one case that the interpreter takes, against what does not compile."""
    case = import_module("benchmarks.suites.neighborhood").Case("a test", (6, 7), 3, heads=1, head_dim=8)

    class Tiny(type(benchmark)):
        modes = ("forward",)

        def cases(self, device, *, everything=False):
            return [replace(case)]

        def makers(self, case, mode, device, *, everything=False):
            made = super().makers(case, mode, device)
            return {name: made[name] for name in ("foveal", "dense flash", "unfold")}

        def plot(self, rows, path):
            pass

    return Tiny()


def measure(context: Context, benchmark: str, only: str) -> Finding:
    """Measure the cases of a benchmark that hold the words `only`, ours and all providers, checked before."""
    if not context.on_gpu and not context.tiny:
        raise SkippedError("the sizes are those of a GPU")
    try:
        suites, runner = import_module("benchmarks.suites"), import_module("benchmarks.runner")
    except ImportError as error:
        raise SkippedError(f"the suites want what is not installed: {error}") from error
    found = next(b for b in suites.REGISTRY if b.name == benchmark)
    console = Console(file=io.StringIO(), width=150)
    run = runner.Runner(context.device, only, 2 if context.tiny else ROUNDS, context.folder, console)
    outcome = run.run([tiny(found) if context.tiny else found])
    print(console.file.getvalue())  # the output of a step is kept where it broke
    if outcome.refused:
        raise WrongResultError("\n".join(outcome.refused))
    if not outcome.rows:
        raise SkippedError(f"nothing was measured of {benchmark} {only!r}")
    timed = {row.provider for row in outcome.rows if row.metric == "time"}
    missing = [] if any(name.startswith("natten") for name in timed) or benchmark != "neighborhood" else ["natten"]
    notes = [f"{records.name_of(context.device)}: {len(timed)} providers: {', '.join(sorted(timed))}"]
    notes += [f"without {', '.join(missing)}: not installed, or it cannot run the case"] if missing else []
    return Finding(notes, goals(outcome.rows))
