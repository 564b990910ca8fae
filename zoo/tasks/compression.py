"""Learned compression: bits and errors together, measured beside JPEG of the same size."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.loader import PADDING
from ..restoration.segpic import RegionCodec
from ._base import mean_metrics
from .epochs import EpochTask
from .model import told_as
from .restoration import psnr


def tones(images: Tensor, count: int, *, cell: int = 8) -> Tensor:
    """Regions of equal tone: means of cells of `cell` pixels, in `count` bands of equal size.

    Args:
        images: `[B, C, H, W]`.
        count: bands.
        cell: pixels a side.

    Returns:
        labels `[B, H, W]`.
    """
    coarse = F.avg_pool2d(images.mean(1, keepdim=True), cell, ceil_mode=True)
    ranks = coarse.flatten(1).argsort(1).argsort(1)
    labels = (ranks * count // ranks.shape[1]).view_as(coarse)
    wide = labels.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    return wide[:, 0, : images.shape[2], : images.shape[3]]


def jpeg(image: Tensor, bpp: float) -> tuple[float, float]:
    """The JPEG of an image whose size comes closest to a number of bits a pixel.

    Args:
        image: `[3, H, W]` or `[1, H, W]` in [0, 1].
        bpp: aimed at.

    Returns:
        its PSNR in dB, and its bits a pixel, headers included.
    """
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    whole, best, count = Image.fromarray(pixels.squeeze()), (float("inf"), b""), pixels.shape[0] * pixels.shape[1]
    for quality in range(1, 96):
        file = io.BytesIO()
        whole.save(file, "JPEG", quality=quality, optimize=True)
        best = min(best, (abs(8 * file.tell() / count - bpp), file.getvalue()))
    decoded = np.atleast_3d(np.array(Image.open(io.BytesIO(best[1]))))
    found = torch.from_numpy(decoded).permute(2, 0, 1).to(image) / 255
    return psnr(found[None], image[None]).item(), 8 * len(best[1]) / count


class CompressionTask(EpochTask):
    """Trains `RegionCodec` on `(…, images [B, C, H, W], number)`; numbers of PADDING do not count.

    The loss is bits a pixel and `rate` * 255^2 times the squared error. Measured are bits a pixel of rounded values
    (`bpp`), PSNR of RGB (`psnr_rgb`), and those of the JPEG of the nearest size (`psnr_jpeg`, `bpp_jpeg`).

    Args:
        codec: arguments of `RegionCodec`.
        rate: weight of the error; larger: better images of more bits.
        regions: bands of tone that are the regions of training; 0: the grid of cells, as in evaluation.
        scale, in_chans: of the data.
        optimizer, scheduler, lr_batch, compile, seed: as in `EpochTask`.

    Raises:
        ValueError: arguments that the codec does not take, or data of two resolutions.
    """

    progress_metric = "val_psnr_rgb"

    def __init__(
        self,
        *,
        codec: Mapping[str, Any],
        rate: float = 0.0067,
        regions: int = 0,
        scale: int = 1,
        in_chans: int = 3,
        **options: Any,
    ):
        if scale != 1 or rate <= 0 or regions < 0:
            raise ValueError(
                f"task.rate={rate} must be above 0, task.regions={regions} at least 0, data.scale={scale} 1"
            )
        names = ("loss", "bpp", "psnr_rgb", "psnr_jpeg", "bpp_jpeg")
        super().__init__(metrics=mean_metrics(*names), **options)
        self.save_hyperparameters()
        self.codec_cfg, self.rate, self.regions, self.in_chans = dict(codec), rate, regions, in_chans

    def make_model(self) -> nn.Module:
        with told_as("task.codec", self.codec_cfg):
            return RegionCodec(in_chans=self.in_chans, **self.codec_cfg)

    def names_matter(self) -> bool:
        return False

    def measure(self, images: Tensor, regions: Tensor | None = None) -> dict[str, Tensor]:
        """Loss and bits a pixel of a batch, and decoded images."""
        found = self.model(images, regions)
        bpp = found.bits.float().mean() / (images.shape[2] * images.shape[3])
        loss = bpp + self.rate * 255**2 * F.mse_loss(found.images.float(), images)
        return {"loss": loss, "bpp": bpp, "images": found.images.float()}

    def training_loss(self, batch: Any) -> Tensor:
        images = batch[1]
        return self.measure(images, tones(images, self.regions) if self.regions else None)["loss"]

    def evaluate(self, split: str, batch: Any, batch_idx: int) -> Any:
        images = batch[1][batch[2] != PADDING]
        if not len(images):
            return None
        found = self.measure(images)
        measured = {name: found[name] for name in ("loss", "bpp")}
        measured["psnr_rgb"] = psnr(found["images"], images).mean()
        beside = [jpeg(image, float(found["bpp"])) for image in images]
        measured["psnr_jpeg"], measured["bpp_jpeg"] = images.new_tensor(beside).mean(0)
        self.record(split, measured, weight=len(images))
        return {"image": images, "decoded": found["images"]}
