"""What a step is given, and where it runs."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Context:
    """Options of a step.

    Attributes:
        device: device of the calls. On a CPU Triton's interpreter runs the kernels.
        folder: gets rows of measurements, as CSV.
        seconds: after which a step that takes many cases takes no more.
        tiny: whether the smallest sizes and fewest cases do, to see that everything runs.
    """

    device: torch.device
    folder: Path
    seconds: float
    tiny: bool = False
    began: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def late(self) -> bool:
        """Return whether the time is up."""
        return time.monotonic() - self.began > self.seconds

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes of the kernels; products of bfloat16 are wrong in Triton's interpreter."""
        if self.tiny:
            return (torch.float32,)
        return (torch.float32, torch.float16, torch.bfloat16) if self.on_gpu else (torch.float32, torch.float16)

    def finish(self) -> None:
        """Wait for the device, so that an error of it is an error of the step."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def child_environment(device: str, link: Path) -> dict[str, str]:
    """Variables of the process of a step: where our packages are, and on a CPU Triton's interpreter.

    Args:
        device: cpu or cuda.
        link: folder that holds the checkout under the name `foveal`.
    """
    paths = [str(link), str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "KINETO_LOG_LEVEL": "99"}
    return found | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if device == "cpu" else {})
