"""Models without data: built on the meta device, and without initialisation in a third of the time."""

from collections.abc import Iterator
from contextlib import contextmanager

import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _WithoutInitialisation(TorchDispatchMode):
    """Skips in-place operators on tensors without data, which change neither shape nor dtype."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.endswith("_") and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_data() -> Iterator[None]:
    """Within it, modules are built on the meta device and not initialised."""
    with torch.device("meta"), _WithoutInitialisation():
        yield


def create_without_data(name: str, **arguments) -> torch.nn.Module:
    """A model of timm's registry without data."""
    with without_data():
        return timm.create_model(name, **arguments)
