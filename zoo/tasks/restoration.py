"""Networks from image to image: trained on pairs, measured by PSNR of luma as super-resolution is, and by SSIM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from .. import restoration
from ..data.loader import PADDING
from ..data.names import unknown_name
from ._base import mean_metrics
from .epochs import EpochTask

NETWORKS = {
    "a2n": restoration.A2N,
    "catanet": restoration.CATANet,
    "region_attention": restoration.RegionAttentionTransformer,
    "shadow_remover": restoration.ShadowRemover,
}


def luma(images: Tensor) -> Tensor:
    """Y of BT.601 with its range of 16 to 235, of RGB `[B, 3, H, W]` in [0, 1], as `[B, 1, H, W]` in [0, 1]."""
    weights = images.new_tensor([65.481, 128.553, 24.966]) / 255
    return torch.einsum("bchw,c->bhw", images, weights)[:, None] + 16 / 255


def psnr(found: Tensor, target: Tensor, *, border: int = 0) -> Tensor:
    """Peak signal to noise per image in dB, `[B]`: values rounded to 1/255, borders cut.

    Args:
        found, target: `[B, C, H, W]` in [0, 1].
        border: pixels to leave out on each side.
    """
    found, target = (_cut((x.clamp(0, 1) * 255).round() / 255, border) for x in (found, target))
    return _psnr(found, target)


def psnr_luma(found: Tensor, target: Tensor, *, border: int = 0) -> Tensor:
    """The same of the luma of images that are rounded first, as super-resolution is measured."""
    found, target = (_cut(luma((x.clamp(0, 1) * 255).round() / 255), border) for x in (found, target))
    return _psnr(found, target)


def _psnr(found: Tensor, target: Tensor) -> Tensor:
    """Of each image; equal ones have 120 dB, so that a mean over images stays finite."""
    decibels = peak_signal_noise_ratio(found, target, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return decibels.clamp_max(120)


def _cut(x: Tensor, border: int) -> Tensor:
    return x[..., border : x.shape[-2] - border, border : x.shape[-1] - border] if border else x


def charbonnier(found: Tensor, target: Tensor, eps: float = 1e-3) -> Tensor:
    """Mean of sqrt(error^2 + eps^2)."""
    return ((found - target).square() + eps**2).sqrt().mean()


LOSSES = {"l1": F.l1_loss, "charbonnier": charbonnier}


class RestorationTask(EpochTask):
    """Trains a network on pairs `(input [B, C, h, w], target [B, C, scale * h, scale * w], number)`.

    PSNR is of luma with a border of `scale` pixels cut (`psnr`), and of RGB whole (`psnr_rgb`); `psnr_base` is that of
    the bicubic enlargement, or of the input where scale is 1.

    Args:
        network: `name` ("a2n", "catanet", "region_attention", "shadow_remover") and optional `args`, its arguments.
        loss: "l1" or "charbonnier".
        tile: pixels a side of the tiles by which whole images are restored in evaluation, with the overlap of
            `restore_in_tiles`; None: at once.
        self_ensemble: evaluate the mean over eight flips and turns; not with tile.
        scale, in_chans: of the data.
        optimizer, scheduler, lr_batch, compile, seed: as in `EpochTask`.

    Raises:
        ValueError: an unknown network or loss, or arguments that it does not take.
    """

    progress_metric = "val_psnr"

    def __init__(
        self,
        *,
        network: Mapping[str, Any],
        loss: str = "l1",
        tile: int | None = None,
        self_ensemble: bool = False,
        scale: int = 1,
        in_chans: int = 3,
        **options: Any,
    ):
        if network.get("name") not in NETWORKS:
            raise unknown_name("task.network.name", network.get("name"), NETWORKS)
        if loss not in LOSSES:
            raise unknown_name("task.loss", loss, LOSSES)
        if tile is not None and (tile <= 32 or self_ensemble):
            raise ValueError(f"task.tile={tile} must be above 32, twice the overlap, and is not with self_ensemble")
        super().__init__(metrics=mean_metrics("loss", "psnr", "psnr_rgb", "psnr_base", "ssim"), **options)
        self.save_hyperparameters()
        self.network_cfg, self.loss, self.scale, self.in_chans = dict(network), LOSSES[loss], scale, in_chans
        self.tile, self.self_ensemble = tile, self_ensemble

    def make_model(self) -> nn.Module:
        options = dict(self.network_cfg.get("args") or {})
        network = NETWORKS[self.network_cfg["name"]]
        scaled = {"scale": self.scale} if network in (restoration.A2N, restoration.CATANet) else {}
        try:
            model = network(**scaled, in_chans=self.in_chans, **options)
        except TypeError as error:
            raise ValueError(f"task.network={self.network_cfg} does not work: {error}") from error
        if model.scale != self.scale:
            raise ValueError(
                f"task.network.name={self.network_cfg['name']!r} does not enlarge; data.scale is {self.scale}"
            )
        return model

    def names_matter(self) -> bool:
        return False

    def training_loss(self, batch: Any) -> Tensor:
        return self.loss(self.model(batch[0]), batch[1])

    def restore(self, x: Tensor) -> Tensor:
        """Result of evaluation: at once, by tiles, or as a mean of turned copies."""
        if self.tile is not None:
            return restoration.restore_in_tiles(self.model, x, tile=self.tile)
        return restoration.self_ensemble(self.model, x) if self.self_ensemble else self.model(x)

    def evaluate(self, split: str, batch: Any, batch_idx: int) -> Any:
        real = batch[2] != PADDING
        if not real.any():
            return None
        given, target = batch[0][real], batch[1][real]
        found = self.restore(given)
        base = given if self.scale == 1 else F.interpolate(given, scale_factor=self.scale, mode="bicubic")
        measured = {
            "loss": self.loss(found, target),
            "psnr": psnr_luma(found, target, border=self.scale).mean(),
            "psnr_rgb": psnr(found, target).mean(),
            "psnr_base": psnr_luma(base, target, border=self.scale).mean(),
            "ssim": structural_similarity_index_measure(found.clamp(0, 1), target, data_range=1.0),
        }
        self.record(split, measured, weight=len(target))
        return {"given": base, "restored": found, "whole": target}
