"""Kernels run in Triton's interpreter, made quick."""

import interpreted
import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as slow whatever is not among the `QUICK` tests of its file, names or beginnings of names, and as exhaustive
    random cases from number `SLOW` on."""
    for item in items:
        first = item.callspec.params.get("first", 0) if hasattr(item, "callspec") else 0
        if first >= getattr(item.module, "SLOW", float("inf")):
            item.add_marker(pytest.mark.exhaustive)
        elif not item.name.startswith(item.module.QUICK):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    with interpreted.quick():
        yield
