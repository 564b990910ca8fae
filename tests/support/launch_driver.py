"""A Triton driver without a device: kernels are specialised and compiled as for a GPU, and launched nowhere."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context

from foveal.kernels import ops  # noqa: F401 - declares all operators
from foveal.kernels.common.launching import device_scratch
from foveal.kernels.common.operator import OPERATORS
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class LaunchDriver:
    """What Triton asks of a driver, for an H200.

    Attributes:
        compiled: names of the kernels that were compiled inside the block.
        launched: names of the kernels that were launched.
        with_scratch: names of those that found memory for descriptors.
    """

    def __init__(self):
        self.compiled: list[str] = []
        self.launched: list[str] = []
        self.with_scratch: list[str] = []
        self.utils = self

    def launcher_cls(self, source, metadata):
        def launch(*arguments):
            driver.active.launched.append(metadata.name)
            if device_scratch in copy_context().values():
                driver.active.with_scratch.append(metadata.name)

        return launch

    def load_binary(self, name, binary, shared, device):
        self.compiled.append(name)
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def launches() -> Iterator[LaunchDriver]:
    """Inside the block `impl="triton"` takes CPU tensors and goes all the way to the launch; outputs hold anything."""
    for operator in OPERATORS.values():
        if "triton" in operator.modules:
            operator.module("triton")  # as kernels for a device, not for the interpreter
    found, before = LaunchDriver(), driver._active
    driver.set_active(found)
    os.environ["TRITON_INTERPRET"] = "1"  # which the choice of implementation reads at every call
    try:
        yield found
    finally:
        del os.environ["TRITON_INTERPRET"]
        driver._active = before
