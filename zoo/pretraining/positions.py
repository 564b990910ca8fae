"""Pre-training by dropped positions: where was this patch? (DropPos, arXiv:2309.03576)"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .autoencoder import Norm, VisibleViT, take
from .masking import visible_count


class Positions(NamedTuple):
    """Results of `DroppedPositions`.

    Attributes:
        logits: of the places of visible patches `[B, K, N]`.
        dropped: patches whose position was dropped, bool `[B, K]`.
        loss, accuracy: of those.
    """

    logits: Tensor
    dropped: Tensor
    loss: Tensor
    accuracy: Tensor


def smoothed_places(side: int, sigma: float, *, official: bool = False) -> Tensor:
    """Soft labels `[N, N]`: exp(-squared distance / sigma^2), rows that sum to one; one-hot where sigma is 0.

    Args:
        side: patches a side.
        sigma: width in patches.
        official: divide columns instead of rows by the rows' sums, as the published code does.
    """
    count = side**2
    if sigma <= 0:
        return torch.eye(count, dtype=torch.float64)
    at = torch.arange(side, dtype=torch.float64)
    places = torch.cartesian_prod(at, at)
    weight = torch.exp(-((places[:, None] - places) ** 2).sum(-1) / sigma**2)
    sums = weight.sum(-1)
    return weight / sums if official else weight / sums[:, None]


class DroppedPositions(VisibleViT):
    """Sees some patches, most of them without a position, and says where they were.

    Args:
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder, which has no positions.
        temperature: of the likeness to the class token, which weighs the patches of the loss.
        official_smoothing: see `smoothed_places`.
        options: as of `VisibleViT`.
    """

    def __init__(
        self,
        *,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 2,
        decoder_num_heads: int = 16,
        temperature: float = 0.1,
        official_smoothing: bool = False,
        **options: Any,
    ):
        super().__init__(**options)
        dim = self.norm.normalized_shape[0]
        self.temperature, self.official_smoothing = temperature, official_smoothing
        self.mask_pos_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.decoder_embed = nn.Linear(dim, decoder_embed_dim)
        self.decoder_blocks = self.make_blocks(
            decoder_embed_dim, decoder_depth, decoder_num_heads, options.get("mlp_ratio", 4.0)
        )
        self.decoder_norm = Norm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.side**2)

    @torch.no_grad()
    def attention(self, images: Tensor) -> Tensor:
        """Weights of all patches `[B, N]`: softmax of their likeness to the class token in whole images."""
        x = F.normalize(self.encode(images), dim=-1)
        return (torch.einsum("bd,bnd->bn", x[:, 0], x[:, 1:]) / self.temperature).softmax(-1)

    def forward(
        self,
        images: Tensor,
        order: Tensor,
        drop_order: Tensor,
        *,
        ratio: float = 0.75,
        drop_ratio: float = 0.75,
        sigma: float = 0.0,
        guided: bool = True,
    ) -> Positions:
        """Predict places.

        Args:
            images: `[B, C, H, W]`.
            order: of the patches `[B, N]`; the first ones are visible.
            drop_order: of the visible ones `[B, K]`; the first ones keep their positions.
            ratio, drop_ratio: shares of masked patches and of dropped positions.
            sigma: width of the soft labels.
            guided: weigh patches by `attention`.
        """
        visible = order[:, : visible_count(order.shape[1], ratio)]
        kept = drop_order[:, : int(visible.shape[1] * (1 - drop_ratio))]
        dropped = torch.ones(visible.shape, dtype=torch.bool, device=images.device).scatter(1, kept, False)
        fixed = take(self.pos_embed[:, 1:].expand(len(images), -1, -1), visible)
        positions = torch.where(dropped[..., None], self.mask_pos_token, fixed)
        x = self.decoder_embed(self.encode(images, visible, positions=positions))
        for block in self.decoder_blocks:
            x = block(x)
        logits = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        labels = smoothed_places(self.side, sigma, official=self.official_smoothing).to(logits)[visible]
        losses = -(labels * logits.log_softmax(-1)).sum(-1)
        weight = dropped.to(losses)
        if guided:
            attention = self.attention(images).gather(1, visible)
            weight = weight * attention / attention.sum(-1, keepdim=True)
        right = (logits.argmax(-1) == visible) & dropped
        loss = (losses * weight).sum() / weight.sum()
        return Positions(logits, dropped, loss, right.sum() / dropped.sum().clamp_min(1))
