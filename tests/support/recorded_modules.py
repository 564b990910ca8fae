"""Recordings of official modules: weights drawn by name, inputs by seed, outputs in one archive."""

import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parents[1] / "goldens"


def draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights of a name in float64: norms near one, layers by fan-in, biases and free parameters small."""
    x = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape)
    last = key.split(".")[-1]
    if last.startswith(("gamma", "layer_scale")):
        return 0.5 * (1 + 0.1 * x)
    if last.endswith("weight"):
        return 1 + 0.1 * x if len(shape) == 1 else x / np.sqrt(np.prod(shape[1:]))
    return (0.1 if last.endswith("bias") and len(shape) == 1 else 0.2) * x


def fill(module: nn.Module, *, keep: tuple[str, ...] = (), prefix: str = "") -> nn.Module:
    """Give a module the recorded weights by its own names; those that `keep` names stay."""
    with torch.no_grad():
        for key, x in module.state_dict().items():
            if x.is_floating_point() and not any(key.startswith(k) or key.endswith(k) for k in keep):
                x.copy_(torch.from_numpy(np.ascontiguousarray(draw(prefix + key, tuple(x.shape)))))
    return module.eval()


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Unit noise, float64."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


@cache
def archive() -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / "vision_modules.npz"))


def recorded(case: str) -> dict[str, Tensor]:
    """Arrays of a case by name."""
    found = {k.split("/")[1]: torch.from_numpy(x) for k, x in archive().items() if k.startswith(f"{case}/")}
    assert found, f"no recording of {case}"
    return found
