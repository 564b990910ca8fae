"""What NATTEN's own kernels gave, and the inputs they had."""

import json
from pathlib import Path

import numpy as np
import torch

GOLDENS = Path(__file__).parents[1] / "goldens"
RECORDED = [c for c in json.loads((GOLDENS / "neighborhood.json").read_text())["configs"] if "out_keys" in c]
RECORDED_BIAS = json.loads((GOLDENS / "neighborhood_rpb.json").read_text())["configs"]


def recorded_inputs(config, *more: tuple[int, ...]) -> list[torch.Tensor]:
    random = np.random.RandomState(config["seed"])
    arrays = [random.standard_normal((4, config["tokens"], 2, 8)), *(random.standard_normal(size) for size in more)]
    arrays = [np.clip(np.round(x * 16) / 16, -3.9375, 3.9375) for x in arrays]
    grids = [torch.from_numpy(x).reshape(1, *config["shape"], 2, 8) for x in arrays[0]]
    return [*grids, *(torch.from_numpy(x) for x in arrays[1:])]


def assert_recorded(got: torch.Tensor, path: str, key: str) -> None:
    with np.load(GOLDENS / path) as file:
        expected = torch.from_numpy(file[key]).double()
    torch.testing.assert_close(got.detach().reshape(expected.shape), expected, rtol=1e-6, atol=1e-6)
