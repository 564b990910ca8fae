"""Masked autoencoders of images, and what other tasks add to them. Parameters are named as in the official files."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from .masking import restore, visible_count

Norm = partial(nn.LayerNorm, eps=1e-6)


def sincos_positions(dim: int, side: int, *, prefix: int = 1) -> Tensor:
    """Fixed positions `[1, prefix + side * side, dim]`: half of the channels of columns, half of rows, zeros first."""
    rate = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    at = torch.arange(side, dtype=torch.float64)[:, None] * rate
    axis = torch.cat([at.sin(), at.cos()], dim=1)  # [side, dim / 2]
    rows, columns = axis.repeat_interleave(side, 0), axis.repeat(side, 1)
    table = torch.cat([torch.zeros(prefix, dim, dtype=torch.float64), torch.cat([columns, rows], dim=1)])
    return table[None].float()


def patchify(images: Tensor, patch: int) -> Tensor:
    """`[B, C, H, W]` to `[B, N, patch * patch * C]`: row, column, channel inside of a patch."""
    batch, channels, height, width = images.shape
    x = images.view(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def normalized_patches(patches: Tensor) -> Tensor:
    """Each patch less its mean over its deviation (unbiased variance)."""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `[B, N, dim]` at places `[B, K]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class Reconstruction(NamedTuple):
    """Results of `MaskedAutoencoder`.

    Attributes:
        prediction: of the pixels of all patches `[B, N, pixels]`, in the order of the image.
        losses: of the masked patches `[B, masked]`, in the order that was given.
        predicted_losses: of all patches `[B, N]`, or None.
        features: class token and visible patches `[B, 1 + visible, dim]`.
    """

    prediction: Tensor
    losses: Tensor
    predicted_losses: Tensor | None
    features: Tensor


class VisibleViT(nn.Module):
    """A vision transformer that sees some patches. `encode` is what pre-training asks of a trunk.

    Args:
        img_size, patch_size, in_chans: of the images.
        embed_dim, depth, num_heads, mlp_ratio: of the blocks.
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.patch_size, self.side = patch_size, img_size // patch_size
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.side), requires_grad=False)
        self.blocks = self.make_blocks(embed_dim, depth, num_heads, mlp_ratio)
        self.norm = Norm(embed_dim)

    @staticmethod
    def make_blocks(dim: int, depth: int, heads: int, mlp_ratio: float) -> nn.ModuleList:
        """Blocks of timm."""
        return nn.ModuleList(Block(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=Norm) for _ in range(depth))

    def encode(self, images: Tensor, visible: Tensor | None = None, *, positions: Tensor | None = None) -> Tensor:
        """Features of the visible patches.

        Args:
            images: `[B, C, H, W]`.
            visible: places `[B, K]`; all patches when None.
            positions: of the visible patches `[B, K, dim]`, instead of the fixed ones.

        Returns:
            class token and patches `[B, 1 + K, dim]`.
        """
        x = self.patch_embed(images)
        fixed = self.pos_embed[:, 1:].expand(len(x), -1, -1)
        if visible is not None:
            x, fixed = take(x, visible), take(fixed, visible)
        x = x + (fixed if positions is None else positions)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class MaskedAutoencoder(VisibleViT):
    """Predicts the pixels of masked patches (MAE, arXiv:2111.06377), and how large its losses will be (HPM).

    Args:
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder.
        norm_pix_loss: targets are patches normalized one by one.
        loss_prediction: a second decoder predicts the loss of each patch (arXiv:2304.05919, section 3.2).
        options: as of `VisibleViT`.
    """

    def __init__(
        self,
        *,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = True,
        loss_prediction: bool = False,
        **options: Any,
    ):
        super().__init__(**options)
        dim, mlp_ratio = self.norm.normalized_shape[0], options.get("mlp_ratio", 4.0)
        self.norm_pix_loss = norm_pix_loss
        self.decoder_embed = nn.Linear(dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_embed_dim, self.side), requires_grad=False)
        pixels = self.patch_size**2 * options.get("in_chans", 3)
        self.suffixes = ["", "_losspred"] if loss_prediction else [""]
        for suffix in self.suffixes:
            blocks = self.make_blocks(decoder_embed_dim, decoder_depth, decoder_num_heads, mlp_ratio)
            setattr(self, f"decoder_blocks{suffix}", blocks)
            setattr(self, f"decoder_norm{suffix}", Norm(decoder_embed_dim))
            setattr(self, f"decoder_pred{suffix}", nn.Linear(decoder_embed_dim, pixels))

    def decode(self, features: Tensor, order: Tensor, suffix: str = "") -> Tensor:
        """Predictions `[B, N, pixels]` in the order of the image, from features of its first patches."""
        x = self.decoder_embed(features)
        masked = self.mask_token.expand(len(x), order.shape[1] + 1 - x.shape[1], -1)
        patches = take(torch.cat([x[:, 1:], masked], dim=1), restore(order))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in getattr(self, f"decoder_blocks{suffix}"):
            x = block(x)
        return getattr(self, f"decoder_pred{suffix}")(getattr(self, f"decoder_norm{suffix}")(x))[:, 1:]

    def forward(self, images: Tensor, order: Tensor, *, ratio: float = 0.75) -> Reconstruction:
        """Reconstruct images from the first patches of an order `[B, N]`."""
        visible = visible_count(order.shape[1], ratio)
        features = self.encode(images, order[:, :visible])
        prediction = self.decode(features, order)
        target = patchify(images, self.patch_size)
        target = normalized_patches(target) if self.norm_pix_loss else target
        losses = (prediction - target).square().mean(-1).gather(1, order[:, visible:])
        predicted = self.decode(features, order, "_losspred").mean(-1) if len(self.suffixes) > 1 else None
        return Reconstruction(prediction, losses, predicted, features)

    @torch.no_grad()
    def predict_losses(self, images: Tensor) -> Tensor:
        """Losses per patch `[B, N]` that the second decoder expects, from whole images."""
        order = torch.arange(self.side**2, device=images.device).expand(len(images), -1)
        return self.decode(self.encode(images), order, "_losspred").mean(-1)


def relative_loss(predicted: Tensor, losses: Tensor) -> Tensor:
    """Cross-entropy of which of two patches has the larger loss, over all pairs that differ (HPM's objective).

    Args:
        predicted, losses: `[B, K]`; losses are constants.
    """
    losses = losses.detach()
    apart = losses[:, :, None] - losses[:, None]
    p = (predicted[:, :, None] - predicted[:, None]).sigmoid()
    terms = torch.where(apart > 0, -(p + 1e-6).log(), torch.where(apart < 0, -(1 - p + 1e-6).log(), 0.0))
    return terms.sum() / (apart != 0).sum().clamp_min(1)


def absolute_loss(predicted: Tensor, losses: Tensor) -> Tensor:
    """Squared error of predicted losses against those of each image, standardized."""
    losses = losses.detach()
    losses = (losses - losses.mean(-1, keepdim=True)) / (losses.var(-1, keepdim=True) + 1e-6).sqrt()
    return F.mse_loss(predicted, losses)


class BroadContext(nn.Module):
    """Agreement of two views whose visible patches are disjoint, with a teacher that sees both whole (LUT).

    Features of visible patches are averaged and go through `head` and `predictor`; the teacher's through its `head`.
    Source: arXiv:2310.13593, section 3.2.

    Args:
        dim: channels of the features.
        hidden: of both networks.
    """

    def __init__(self, dim: int, hidden: int = 4096):
        super().__init__()
        self.head, self.predictor = (
            nn.Sequential(
                nn.Linear(dim, hidden, bias=False),
                nn.BatchNorm1d(hidden),
                nn.ReLU(),
                nn.Linear(hidden, dim, bias=False),
            )
            for _ in range(2)
        )

    @staticmethod
    def disjoint(order: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        """Visible patches of the two views: the first ones of an order, and the next ones.

        Raises:
            ValueError: more than half of the patches would be visible.
        """
        count = visible_count(order.shape[1], ratio)
        if 2 * count > order.shape[1]:
            raise ValueError(f"ratio={ratio} must be 0.5 or more: views share no patch")
        return order[:, :count], order[:, count : 2 * count]

    def loss(self, students: tuple[Tensor, Tensor], teachers: tuple[Tensor, Tensor]) -> Tensor:
        """Mean of 2 - 2 cos of each student view and the teacher's other one.

        Args:
            students: mean features of both views `[B, dim]`.
            teachers: heads' results of the teacher's views `[B, dim]`, constants.
        """
        q = [self.predictor(self.head(x)) for x in students]
        pairs = ((q[0], teachers[1]), (q[1], teachers[0]))
        return torch.stack([(2 - 2 * F.cosine_similarity(a, b.detach())).mean() for a, b in pairs]).mean()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Move a teacher's parameters and statistics towards a student's: decay * teacher + (1 - decay) * student."""
    for kind in ("parameters", "buffers"):
        for ours, theirs in zip(getattr(teacher, kind)(), getattr(student, kind)(), strict=True):
            if ours.is_floating_point():
                ours.lerp_(theirs, 1 - decay)
