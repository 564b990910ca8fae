"""Kernels run in Triton's interpreter, made quick."""

import interpreted
import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as slow whatever is not among the `QUICK` tests of its file: names, or beginnings of names."""
    for item in items:
        if not item.name.startswith(item.module.QUICK):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    with interpreted.quick():
        yield
