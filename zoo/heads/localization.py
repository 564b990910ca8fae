"""Localization by a token that learns where the object is, from image labels alone (SAT, ICCV 2023)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.ops import scaled_attention
from .parts import add_branches, embed, take_parts

KERNEL = (  # of the smoothing in the loss, as published: a Gaussian of sigma 0.42
    (0.0026284618773611238, 0.04601160340728156, 0.00262846187736114),
    (0.04601160340728156, 0.8054397388614286, 0.046011603407281845),
    (0.00262846187736114, 0.046011603407281845, 0.0026284618773611563),
)


class Localization(NamedTuple):
    """Results of `SpatialTokenViT`.

    Attributes:
        logits: `[B, classes]`.
        map: where the object is, `[B, rows, columns]` in (0, 1).
    """

    logits: Tensor
    map: Tensor


class SpatialTokenViT(nn.Module):
    """A ViT with a spatial token, whose similarity to each patch scales attention in the last blocks.

    The token stands last. In the last `scaled` blocks the weights of all queries on key j are multiplied, after the
    softmax, by the sigmoid of the token's mean logit on j; rows then sum to less than one. The map is the mean of those
    factors on patches. Patches are classified by a convolution and averaged. Parameters are named as in timm's ViT and
    the official files.

    Args:
        vit: a timm `VisionTransformer` with a class token and absolute positions; its parameters are taken over.
        num_classes: outputs.
        scaled: last blocks whose attention is scaled.
        area: share of an image that objects take on average.

    Raises:
        ValueError: a model without these parts.
    """

    def __init__(self, vit: nn.Module, num_classes: int, *, scaled: int = 3, area: float = 0.35):
        super().__init__()
        take_parts(self, vit)
        if not 0 <= scaled <= len(self.blocks):
            raise ValueError(f"scaled={scaled} must lie in [0, blocks={len(self.blocks)}]")
        dim, like = self.cls_token.shape[-1], self.cls_token
        dd: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.loc_token, self.loc_embed = (nn.Parameter(0.02 * torch.randn(1, 1, dim, **dd)) for _ in range(2))
        self.head = nn.Conv2d(dim, num_classes, 3, padding=1, **dd)
        self.register_buffer("weight", torch.tensor(KERNEL, **dd)[None, None])
        self.scaled, self.area = scaled, area

    def _attend(self, attn: Any, x: Tensor, scaled: bool) -> tuple[Tensor, Tensor]:
        """Attention of a block, and the factor of each key, `[B, N]`."""
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)  # [B, N, heads, d]
        q, k = attn.q_norm(q), attn.k_norm(k)
        logits = torch.einsum("bhd,bnhd->bnh", q[:, -1], k) * attn.scale
        factor = logits.mean(-1).sigmoid()
        out = scaled_attention(
            q, k, v, key_scale=factor[:, None] if scaled else None, renormalize=False, scale=attn.scale
        )
        return attn.proj_drop(attn.proj(attn.norm(out.flatten(2)))), factor

    def forward(self, images: Tensor) -> Localization:
        """Images `[B, C, H, W]` to logits and maps."""
        x, batch = embed(self, images), len(images)
        x = torch.cat([x, (self.loc_token + self.loc_embed).expand(batch, -1, -1)], dim=1)
        factors = []
        for index, block in enumerate(self.blocks):
            scaled = index >= len(self.blocks) - self.scaled
            out, factor = self._attend(block.attn, block.norm1(x), scaled)
            x = add_branches(block, x, out)
            if scaled:
                factors.append(factor[:, 1:-1])
        size = self.patch_embed.grid_size
        patches = self.norm(x)[:, 1:-1].mT.unflatten(2, size)
        found = torch.stack(factors).mean(0) if factors else patches.new_ones(batch, size[0] * size[1])
        return Localization(self.head(patches).mean((2, 3)), found.unflatten(1, size))

    def losses(self, output: Localization, target: Tensor) -> dict[str, Tensor]:
        """Losses of training, to be added.

        Args:
            output: of `forward`.
            target: classes `[B]`.

        Returns:
            `class`; `area`, the distance of the mean map of the batch from the area of objects; `sharp`, which is least
            where smoothed maps are 0 or 1.
        """
        smooth = self.smooth(output.map)
        return {
            "class": F.cross_entropy(output.logits, target),
            "area": (output.map.mean() - self.area).abs(),
            "sharp": ((1 - smooth) * smooth).mean(),
        }

    def smooth(self, maps: Tensor) -> Tensor:
        """Maps `[B, rows, columns]` after a Gaussian of 3 x 3, zeros around them."""
        return F.conv2d(maps[:, None], self.weight.to(maps), padding=1)[:, 0]  # pyright: ignore


def box_of(found: Tensor, *, threshold: float = 0.35, size: tuple[int, int] | None = None) -> tuple[int, int, int, int]:
    """Box of the largest connected part of a map above a threshold.

    Args:
        found: `[rows, columns]`; scaled to [0, 1] first.
        threshold: of the scaled map.
        size: of the image, to which the map is resized bilinearly.

    Returns:
        left, top, right and bottom, the last two exclusive; the whole image where the map is constant.
    """
    from scipy.ndimage import find_objects, label

    if size is not None:
        found = F.interpolate(found[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    span = found.max() - found.min()
    if span <= 0:
        return 0, 0, found.shape[1], found.shape[0]
    found_parts: Any = label(((found - found.min()) / span > threshold).cpu().numpy())
    parts = found_parts[0]
    largest = torch.from_numpy(parts).flatten().bincount()[1:].argmax().item()
    rows, columns = find_objects(parts)[largest]
    return columns.start, rows.start, columns.stop, rows.stop
