"""Parts of timm's vision transformer, for models that run its blocks in another way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PARTS = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")


def take_parts(model: nn.Module, vit: nn.Module) -> None:
    """Give a model the parts of a ViT under their names.

    Raises:
        ValueError: a ViT without one class token or without one of the parts.
    """
    missing = [name for name in PARTS if getattr(vit, name, None) is None]
    if missing or getattr(vit, "num_prefix_tokens", 1) != 1:
        raise ValueError(
            f"{type(vit).__name__} has no {', '.join(missing) or 'single class token'}; expected timm's ViT"
        )
    for name in PARTS:
        setattr(model, name, getattr(vit, name))


def embed(model: Any, images: Tensor) -> Tensor:
    """Class token and patches with positions, `[B, 1 + N, dim]`."""
    x = model.patch_embed(images)
    return torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1) + model.pos_embed


def project(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of timm's attention, `[B, heads, N, d]`."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attn.q_norm(q), attn.k_norm(k), v


def unite(attn: Any, out: Tensor) -> Tensor:
    """Output of timm's attention from those of its heads, `[B, heads, N, d]` to `[B, N, dim]`."""
    return attn.proj_drop(attn.proj(attn.norm(out.transpose(1, 2).flatten(2))))


def add_branches(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Result of timm's block from its input and its attention."""
    x = x + block.drop_path1(block.ls1(attended))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
