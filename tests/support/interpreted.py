"""Triton's interpreter, quick enough for hundreds of cases; what it computes stays the same."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from unittest.mock import patch

from foveal.kernels.tools import compile_report


@contextmanager
def quick() -> Iterator[None]:
    """Let device functions run under the patch of `triton.language` that their kernel made, not one more a call.

    A kernel's patch covers the modules among its globals; device functions of Triton itself use `core`. Checks of
    32-bit overflow, half of the time, go too.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    with ExitStack() as stack:
        replace = stack.enter_context
        for operator in compile_report.OPERATORS:
            for name in ("forward", "backward"):
                module = import_module(f"foveal.kernels.{operator}.{name}")
                replace(patch.object(module, "core", tl.core, create=True))
        run = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)  # noqa: E731
        replace(patch.object(interpreter.InterpretedFunction, "__call__", run))
        options = interpreter.InterpreterOptions(sanitize_overflow=False)
        replace(patch.object(interpreter.interpreter_builder, "options", options))
        yield
