"""The declared steps of the first hour. Worth falls from correctness over peers and tuning to whole suites."""

from functools import partial

from declared import DECLARED

from . import correct, peers, tune
from .context import ROOT
from .plan import Step

VALUES, MEMORY, WATCHED, MASKS, PEERS, TUNING, GLUON, TESTS, SUITES = range(900, 0, -100)
MEASURED = {  # benchmark -> words of its cases, estimate in seconds
    "neighborhood": (
        ("30x48x80 -efficient", 150),  # seconds a call of its backward
        ("256x256 w80 -efficient", 90),
        ("56x56 b64", 60),
        ("28x28 b64", 60),
        ("44x80 -efficient", 120),
    ),
    "window": (("56x56 w7", 60), ("64x64", 60)),
    "agent": (("64x64", 30),),
    "linear": (("256x256", 30),),
    "scan": (("56x56", 60),),
    "routing": (("", 90),),
    "hilo": (("", 60),),
}
WHOLE = {"scaling": 240, "backbones": 300, "video_dit": 240}  # benchmarks of layers and models


def wrong_values(name: str) -> str:
    return f"kernels/{name}: whatever is wrong; nothing of it is timed before"


def correctness() -> list[Step]:
    steps = []
    for name in DECLARED:
        question = "do outputs and gradients keep the error rule against float64, and does auto take the kernels?"
        values = partial(correct.values, name=name)
        steps.append(Step(f"values of {name}", VALUES, 90, values, question, wrong_values(name)))
        question = "are bits the same every time, and from memory that holds NaN?"
        right = (f"values of {name}",)
        memory = partial(correct.memory, name=name)
        steps.append(Step(f"memory of {name}", MEMORY, 40, memory, question, wrong_values(name), needs=right))
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        question = f"does {tool} of compute-sanitizer find anything in any operator?"
        watched = partial(correct.sanitizer, tool=tool)
        steps.append(Step(f"sanitizer {tool}", WATCHED, 60, watched, question, "the kernel that it names"))
    question = "do dynamic masks wait for nothing?"
    return [
        *steps,
        Step("masks without waiting", MASKS, 40, correct.masks, question, "kernels/masks: the file it names"),
    ]


def comparisons() -> list[Step]:
    """Peers: dense attention, compiled flex_attention, and NATTEN where it is installed."""
    operators = {"routing": "block_sparse"}  # whose values must be right, by benchmark
    steps = []
    for name, parts in MEASURED.items():
        needs = () if name == "hilo" else (f"values of {operators.get(name, name)}",)
        for words, seconds in parts:
            measured = partial(peers.measure, benchmark=name, only=words)
            question = "how many times as fast as dense, flex_attention and others, and as the bound?"
            title = f"peers of {name} {words}".strip()
            changes = "docs/benchmarks.md; README's claims of speed"
            steps.append(Step(title, PEERS, seconds, measured, question, changes, alone=True, needs=needs))
    return steps


def questions() -> list[Step]:
    steps = []
    for name, (question, changes) in tune.QUESTIONS.items():
        answer = partial(tune.answer, question=question)
        where = f"kernels/{question.operator}/configs.py: {changes}"
        asked, needs = "which launch is the fastest?", (f"values of {question.operator}",)
        steps.append(Step(f"tune {name}", TUNING, 45, answer, asked, where, alone=True, needs=needs))
    return steps


def gates() -> list[Step]:
    gluon = "is impl='gluon' right, and the same bits every time?"
    steps = [
        Step(f"gluon of {name}", GLUON, 60, partial(correct.gluon, name=name), gluon, "whether auto may take it")
        for name in ("neighborhood", "block_sparse")
    ]
    for path in sorted((ROOT / "tests" / "kernels").glob("test_*_gpu.py")):
        file = path.relative_to(ROOT).as_posix()
        steps.append(
            Step(
                f"tests {path.stem}", TESTS, 200, partial(correct.tests, file=file), f"does {file} pass?", "what fails"
            )
        )
    several = partial(correct.tests, file="tests/kernels/test_neighborhood_sharded.py", marker="multigpu")
    asked = "is sharded attention right over NCCL?"
    return [
        *steps,
        Step("tests on several GPUs", TESTS, 120, several, asked, "LEAST_INTERIOR of shards.py", alone=True),
    ]


def suites() -> list[Step]:
    steps = []
    for name, seconds in WHOLE.items():
        measured = partial(peers.measure, benchmark=name, only="")
        question = "what do whole layers, models and lengths take?"
        steps.append(Step(f"suite {name}", SUITES, seconds, measured, question, "docs/benchmarks.md", alone=True))
    return steps


def tiny() -> list[Step]:
    """One step of every kind, in the smallest sizes, for a CPU."""
    steps = [
        step
        for step in correctness()
        if step.name in ("values of neighborhood", "values of linear", "memory of linear")
    ]
    steps += [step for step in correctness() if step.name == "sanitizer memcheck"]
    measured = partial(peers.measure, benchmark="neighborhood", only="")
    needs = ("values of neighborhood",)
    steps.append(Step("peers of neighborhood", PEERS, 20, measured, "does it run?", "nothing", alone=True, needs=needs))
    for name, (question, changes) in tune.TINY.items():
        answer = partial(tune.answer, question=question)
        steps.append(Step(f"tune {name}", TUNING, 20, answer, "does it run?", changes, alone=True, needs=needs))
    return steps + gates()[:1]


def declared(*, small: bool) -> list[Step]:
    """All steps, or those that the smallest sizes have."""
    return tiny() if small else [*correctness(), *comparisons(), *questions(), *gates(), *suites()]
