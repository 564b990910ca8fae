"""Make Triton's interpreter quick enough for hundreds of cases; what it computes stays the same."""

from importlib import import_module

import pytest
import triton.language as tl
from foveal.kernels.tools import compile_report
from triton.runtime import interpreter


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as slow whatever is not among the `QUICK` tests of its file: names, or beginnings of names."""
    for item in items:
        if not item.name.startswith(item.module.QUICK):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Let device functions run under the patch of `triton.language` that their kernel made, not one more a call.

    A kernel's patch covers the modules among its globals; device functions of Triton itself use `core`. Checks of
    32-bit overflow, half of the time, go too.
    """
    patch = pytest.MonkeyPatch()
    for operator in compile_report.OPERATORS:
        for name in ("forward", "backward"):
            patch.setattr(import_module(f"foveal.kernels.{operator}.{name}"), "core", tl.core, raising=False)
    patch.setattr(
        interpreter.InterpretedFunction, "__call__", lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    )
    patch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False))
    yield
    patch.undo()
