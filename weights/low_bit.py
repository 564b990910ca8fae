"""Moments that torchao keeps in few bits are tensors of its own kind, which PyTorch reads once torchao is imported."""

import sys
from importlib import import_module
from importlib.util import find_spec

PACKAGE = "torchao.optim"


def admit_low_bit(error: BaseException) -> bool:
    """Return whether to read a refused pickle once more: it asked for such tensors, and now they are known."""
    if f"{PACKAGE}." not in str(error) or PACKAGE in sys.modules or find_spec("torchao") is None:
        return False
    import_module(PACKAGE)
    return True
