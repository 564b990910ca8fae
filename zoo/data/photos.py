"""Two photographs that ship with scikit-learn, as pairs of degraded and whole crops."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .base import SeededData
from .loader import PADDING, SeededDataset
from .spec import DataSpec

Degradation = Literal["bicubic", "noise", "none"]


def sample_photos() -> list[Tensor]:
    """The temple and the flower that ship with scikit-learn, `[3, H, W]` in [0, 1]."""
    from sklearn.datasets import load_sample_images

    return [torch.from_numpy(np.array(x)).permute(2, 0, 1) / 255 for x in load_sample_images().images]


def recolored(photo: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A photograph `[C, H, W]` in [0, 1] with its channels mixed up, inverted or not, and darker or brighter."""
    photo = photo[torch.randperm(len(photo), generator=generator)]
    inverted, gamma = torch.rand(2, generator=generator)
    return (1 - photo if inverted < 0.5 else photo).clamp(0, 1) ** (2 * gamma - 1).exp()


class Pairs(Dataset):
    """A photograph `[3, H, W]` in [0, 1], degraded and whole: random crops, or all of it.

    Args:
        photo: the whole photograph.
        crop: pixels a side of a whole crop.
        scale: of the degradation "bicubic".
        degrade: "bicubic" (smaller by scale), "noise" of standard deviation `noise`, or "none".
        count: random crops of an epoch, turned and flipped; None for the photograph itself.
        recolor: mix up the channels of crops, invert half of them, and take them darker or brighter.
    """

    def __init__(
        self,
        photo: Tensor,
        *,
        crop: int,
        scale: int,
        degrade: Degradation,
        noise: float,
        count: int | None,
        recolor: bool = False,
    ):
        self.photo, self.crop, self.count, self.recolor = photo, crop, count, recolor
        self.scale, self.degrade, self.noise = scale, degrade, noise

    def __len__(self) -> int:
        return 1 if self.count is None else self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        whole = self.photo
        if self.count is None:
            height, width = (n - n % self.scale for n in whole.shape[1:])
            whole = whole[:, :height, :width]
        else:
            top, left = (int(torch.randint(n - self.crop + 1, ())) for n in whole.shape[1:])
            whole = whole[:, top : top + self.crop, left : left + self.crop]
            whole = whole.rot90(int(torch.randint(4, ())), (1, 2))
            whole = whole.flip(2) if torch.rand(()) < 0.5 else whole
            whole = recolored(whole) if self.recolor else whole
        if self.scale == 1:
            noise = self.noise * torch.randn(whole.shape) if self.degrade == "noise" else 0.0
            return (whole + noise).contiguous(), whole.contiguous()
        size = (whole.shape[1] // self.scale, whole.shape[2] // self.scale)
        small = F.interpolate(whole[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        return small, whole.contiguous()


class SeededPairs(SeededDataset):
    """Pairs whose crops and noise depend on (seed, epoch, index) only; the third entry is PADDING in one that fills."""

    def __getitem__(self, key: tuple[int, int | None]) -> Any:
        pair = self.draw(key)
        return *pair, PADDING if key[1] is None else 0


class Photos(SeededData):
    """Crops of scikit-learn's china to train on; flower to test on, 427 x 640 pixels, a part of it for validation.

    Args:
        crop: pixels a side of a whole crop, a multiple of scale.
        scale: 2, 3 or 4 with degrade "bicubic", 1 with "noise" and "none".
        degrade: "bicubic", "noise", or "none" for tasks that need whole images alone.
        noise: standard deviation, of pixels in [0, 1].
        epoch_crops: random crops of an epoch.
        recolor: give crops to train on other colors, for tasks that must know those of any photograph.
        batch_size, seed, shuffle, num_workers: as in `SeededData`.

    Raises:
        ValueError: options that do not fit together.
    """

    seeded_dataset = SeededPairs

    def __init__(
        self,
        *,
        batch_size: int = 8,
        crop: int = 48,
        scale: int = 2,
        degrade: Degradation = "bicubic",
        noise: float = 25 / 255,
        epoch_crops: int = 400,
        recolor: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int | None = 0,
    ):
        super().__init__(batch_size=batch_size, seed=seed, shuffle=shuffle, num_workers=num_workers)
        known = ("bicubic", "noise", "none")
        if degrade not in known or (scale == 1) != (degrade != "bicubic") or scale not in (1, 2, 3, 4):
            raise ValueError(
                f"data.degrade={degrade!r} must be 'bicubic' with data.scale={scale} 2, 3 or 4, or 'noise' or 'none' "
                "with 1"
            )
        if crop % scale or not 8 <= crop <= 427:
            raise ValueError(f"data.crop={crop} must be a multiple of data.scale={scale} from 8 to 427")
        self.scale, self.options = scale, {"crop": crop, "scale": scale, "degrade": degrade, "noise": noise}
        self.epoch_crops, self.recolor = epoch_crops, recolor

    @property
    def spec(self) -> DataSpec:
        size = self.options["crop"] // self.scale
        return DataSpec(3, (size, size))

    @property
    def for_task(self) -> dict[str, Any]:
        return {"scale": self.scale, "in_chans": 3}

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:
            return
        china, flower = sample_photos()
        self.datasets["train"] = Pairs(china, count=self.epoch_crops, recolor=self.recolor, **self.options)
        self.datasets["val"] = Pairs(flower[:, 100:292, 200:456], count=None, **self.options)
        self.datasets["test"] = Pairs(flower, count=None, **self.options)
