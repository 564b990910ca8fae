"""Tests of the interpreter need TRITON_INTERPRET=1 before triton is imported, so they run in processes of their own."""

import os

from budget import Budget

SWEEP_CHUNK = 8  # cases a test


def pytest_addoption(parser):
    parser.addoption(
        "--cases", type=int, default=64, metavar="N",
        help="random cases a sweep on a GPU, of which every one compiles three to six kernels, about a second each",
    )  # fmt: skip
    parser.addoption("--budget", action="store_true", help="fail if a default test takes too long")
    parser.addoption(
        "--freeze", action="store_true", help="write the frozen surfaces anew (tests/house/test_frozen.py)"
    )


def pytest_configure(config):
    config.pluginmanager.register(Budget(), "budget")


def pytest_generate_tests(metafunc):
    if "sweep" in metafunc.fixturenames:
        most = metafunc.config.getoption("--cases")
        chunks = [range(first, min(first + SWEEP_CHUNK, most)) for first in range(0, most, SWEEP_CHUNK)]
        metafunc.parametrize("sweep", chunks, ids=lambda chunk: f"{chunk.start}-{chunk.stop - 1}")


collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["kernels/interpreter"]
