"""Registry of the benchmarks, by suite."""

from ..benchmark import Benchmark
from ..operators import Operator
from .agent import Agent
from .control import Controls
from .cores import Cores
from .families import Families
from .hilo import HiLoLayer
from .linear import Linear
from .masks import Masks
from .models import Models
from .neighborhood import Neighborhood
from .routing import Routing
from .scaling import Scaling
from .scan import Scan
from .scored import Scored
from .video import Video
from .window import Window

OPERATORS: tuple[Operator, ...] = (Neighborhood(), Window(), Routing(), Agent(), Linear(), Scan(), Scored(), Masks())
REGISTRY: tuple[Benchmark, ...] = (
    *OPERATORS,
    Cores(),
    HiLoLayer(),
    Scaling(OPERATORS),
    Models(),
    Families(),
    Video(),
    Controls(),
)
SUITES = tuple(dict.fromkeys(benchmark.suite for benchmark in REGISTRY))


def of_suite(suite: str) -> list[Benchmark]:
    """Benchmarks of a suite, or all of them for "all".

    Raises:
        ValueError: no such suite.
    """
    if suite not in (*SUITES, "all"):
        raise ValueError(f"suite={suite!r} must be one of {(*SUITES, 'all')}")
    return [benchmark for benchmark in REGISTRY if suite in ("all", benchmark.suite)]
