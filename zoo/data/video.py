"""Base of video data modules: items are dicts, and batches hold videos of one shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .base import SeededData
from .loader import SeededDataset
from .spec import DataSpec

Item = dict[str, Any]


class SeededVideos(SeededDataset):
    """As `SeededDataset`, for items that are dicts: `real` is False for items that fill up a rank or do not count."""

    def __getitem__(self, key: tuple[int, int | None]) -> Item:  # pyright: ignore[reportIncompatibleMethodOverride]
        item = self.draw(key)
        return {**item, "real": key[1] is not None and item.get("real", True)}


class VideoData(SeededData):
    """Batches of videos: a dict with

    - `video` `[B, C, T, H, W]` float32, normalised pixels or latents;
    - `label` `[B]` int64, if there are classes;
    - `caption`, B strings, or `text` `[B, L, D]` with `text_mask` `[B, L]` bool, if there are captions;
    - `real` `[B]` bool, False for items that only fill up the last batches of a rank, and for unreadable ones.

    Args:
        channels: of the videos.
        frames, height, width: of the videos to generate when somebody wants to see some.
        mean, std: a value per channel; `video = (x - mean) / std`, with pixels `x` in 0..1 or latents `x`.
        num_classes: None for videos without classes.
        text_dim: channels of `text`; None for videos without.
        batch_size, seed, shuffle, num_workers: see `SeededData`.
    """

    item = "videos"
    seeded_dataset = SeededVideos
    vae: Any = None  # of diffusers, if the videos are its latents

    def __init__(
        self,
        *,
        batch_size: int,
        channels: int,
        frames: int,
        height: int,
        width: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        num_classes: int | None = None,
        text_dim: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
    ):
        super().__init__(batch_size=batch_size, seed=seed, shuffle=shuffle, num_workers=num_workers)
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise ValueError(
                    f"data.{name}={tuple(values)} must have one value per channel, and there are {channels}"
                )
        self.channels, self.frames, self.height, self.width = channels, frames, height, width
        self.mean, self.std, self.num_classes, self.text_dim = tuple(mean), tuple(std), num_classes, text_dim
        self.class_names = [str(i) for i in range(num_classes or 0)]

    @property
    def spec(self) -> DataSpec:
        size, names = (self.frames, self.height, self.width), tuple(self.class_names)
        statistics = {"mean": self.mean, "std": self.std}
        return DataSpec(self.channels, size, self.num_classes, names, text_dim=self.text_dim, **statistics)

    @property
    def for_task(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "in_channels": spec.channels,
            "num_classes": spec.num_classes,
            "text_dim": spec.text_dim,
            "clip_sizes": self.clip_sizes,
            "class_names": list(spec.class_names),
        }

    @property
    def clip_sizes(self) -> tuple[str, list[tuple[int, ...]]]:
        """The configuration of the sizes of clips, in words, and `[T, H, W]` of each, in pixels or latents."""
        size = self.frames, self.height, self.width
        return f"data with clips of {list(size)}", [size]

    @property
    def for_pipeline(self) -> dict[str, Any]:
        """Arguments of `VideoDiTPipeline` that only the data know."""
        return {"pixel_mean": self.mean, "pixel_std": self.std, "sample_size": (self.frames, self.height, self.width)}

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(v, device=like.device).view(-1, 1, 1, 1) for v in (self.mean, self.std))
        return mean, std

    def normalize(self, videos: Tensor) -> Tensor:
        """`[…, C, T, H, W]` in 0..1 (pixels) or as the VAE gives it → what the model gets."""
        mean, std = self._statistics(videos)
        return (videos - mean) / std

    def denormalize(self, videos: Tensor) -> Tensor:
        """The way back of `normalize`; pixels are not cut to 0..1."""
        mean, std = self._statistics(videos)
        return videos.float() * std + mean

    def pixels(self, videos: Tensor, *, device: torch.device | None = None) -> Tensor:
        """Videos as the model makes them → pixels `[…, C, T, H, W]` in 0..1; an autoencoder decodes on `device`."""
        return self.denormalize(videos).clamp(0, 1)

    def dataset(self, split: str) -> Dataset:
        """The videos of "train", "val" or "test" by index, without order or augmentation by epoch."""
        self.setup()
        return self.datasets[split]
