"""Completion of an image from a second view of the scene (CroCo, arXiv:2210.10716)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

from .autoencoder import Norm, normalized_patches, patchify, sincos_positions, take
from .masking import restore


class CrossAttention(nn.Module):
    """Attention from tokens to a memory, with a projection each."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.projq, self.projk, self.projv, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        parts = (self.projq(x), self.projk(memory), self.projv(memory))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Self-attention, attention to a memory that no block changes, and a network."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm_y = (Norm(dim) for _ in range(4))
        self.attn, self.cross_attn = Attention(dim, heads, qkv_bias=True), CrossAttention(dim, heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), self.norm_y(memory))
        return x + self.mlp(self.norm3(x))


class Completion(NamedTuple):
    """Results of `CrossViewCompletion`.

    Attributes:
        prediction: of the pixels of the first image's patches `[B, N, pixels]`.
        loss: of the masked ones.
    """

    prediction: Tensor
    loss: Tensor


class CrossViewCompletion(nn.Module):
    """Predicts masked patches of one image from its visible ones and a second, whole view.

    Fixed positions, as in the first version. Parameters are named as in the official files, whose weights have a
    license for non-commercial use.

    Args:
        img_size, patch_size, in_chans: of the images.
        enc_embed_dim, enc_depth, enc_num_heads: of the encoder of both images.
        dec_embed_dim, dec_depth, dec_num_heads: of the decoder.
        norm_pix_loss: targets are patches normalized one by one.
    """

    enc_pos_embed: Tensor
    dec_pos_embed: Tensor

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        enc_embed_dim: int = 768,
        enc_depth: int = 12,
        enc_num_heads: int = 12,
        dec_embed_dim: int = 512,
        dec_depth: int = 8,
        dec_num_heads: int = 16,
        norm_pix_loss: bool = True,
    ):
        super().__init__()
        side = self.side = img_size // patch_size
        self.patch_size, self.norm_pix_loss = patch_size, norm_pix_loss
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, enc_embed_dim)
        for name, dim in (("enc", enc_embed_dim), ("dec", dec_embed_dim)):
            self.register_buffer(f"{name}_pos_embed", sincos_positions(dim, side, prefix=0)[0])
        self.enc_blocks = nn.ModuleList(
            Block(enc_embed_dim, enc_num_heads, qkv_bias=True, norm_layer=Norm) for _ in range(enc_depth)
        )
        self.enc_norm = Norm(enc_embed_dim)
        self.decoder_embed = nn.Linear(enc_embed_dim, dec_embed_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dec_embed_dim))
        self.dec_blocks = nn.ModuleList(CrossBlock(dec_embed_dim, dec_num_heads) for _ in range(dec_depth))
        self.dec_norm = Norm(dec_embed_dim)
        self.prediction_head = nn.Linear(dec_embed_dim, patch_size**2 * in_chans)

    def encode(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Features of the visible patches `[B, K, dim]`; of all when None."""
        x = self.patch_embed(images) + self.enc_pos_embed
        x = x if visible is None else take(x, visible)
        for block in self.enc_blocks:
            x = block(x)
        return self.enc_norm(x)

    def forward(self, images: Tensor, other: Tensor, order: Tensor, *, masked: int) -> Completion:
        """Complete images by another view.

        Args:
            images, other: `[B, C, H, W]` each.
            order: of the patches of the first image `[B, N]`; all but the last `masked` are visible.
            masked: number of masked patches; the published recipe masks int(0.9 * N).
        """
        visible = order[:, : order.shape[1] - masked]
        x, memory = (self.decoder_embed(f) for f in (self.encode(images, visible), self.encode(other)))
        x = torch.cat([x, self.mask_token.expand(len(x), masked, -1)], dim=1)
        x, memory = take(x, restore(order)) + self.dec_pos_embed, memory + self.dec_pos_embed
        for block in self.dec_blocks:
            x = block(x, memory)
        prediction = self.prediction_head(self.dec_norm(x))
        target = patchify(images, self.patch_size)
        target = normalized_patches(target) if self.norm_pix_loss else target
        losses = (prediction - target).square().mean(-1)
        return Completion(prediction, losses.gather(1, order[:, visible.shape[1] :]).mean())
