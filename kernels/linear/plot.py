"""Pictures of linear attention: what one query weighs with a softmax, with ReLU features, and centred."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ..common.calling import resolve_scale

TITLES = ("softmax attention", "linear, ReLU features", "linear, centred")
CAPTIONS = ("sharp: exponentials", "even: products of features", "of both signs")


@torch.no_grad()
def attention_maps(
    query: Tensor, key: Tensor, token: tuple[int, int], *, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of one query of one head, each summing to one.

    Args:
        query, key: `[H, W, head_dim]`.
        token: row and column of the query.
        scale: factor on the logits and on the covariance; head_dim ** -0.5 when None.

    Returns:
        softmax attention, linear attention with ReLU and a normaliser, and centred linear attention, `[H, W]` each.
    """
    factor: float = resolve_scale(query, scale)
    keys, own = key.flatten(0, 1), query[token]
    dense = (keys @ own * factor).softmax(0)
    products = keys.relu() @ own.relu()
    centered = (1 + factor * (keys - keys.mean(0)) @ own) / len(keys)
    first, second, third = (x.view(key.shape[:2]) for x in (dense, products / products.sum(), centered))
    return first, second, third


def plot_linear_attention(
    query: Tensor, key: Tensor, *, token: tuple[int, int], path: str | os.PathLike, scale: float | None = None
) -> Path:
    """Draw what one query weighs by softmax, by linear and by centred linear attention.

    Args:
        query, key: `[H, W, head_dim]`, one head of one image.
        token: row and column of the query.
        path: where the picture goes; its suffix says the format.
        scale: factor on the logits and on the covariance; head_dim ** -0.5 when None.

    Returns:
        `path`.

    Raises:
        ValueError: a token outside the grid.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not all(0 <= t < n for t, n in zip(token, query.shape[:2], strict=True)):
        raise ValueError(f"token={token} must lie in the grid of query.shape={tuple(query.shape)}")
    panels = [x.double().cpu() * x.numel() for x in attention_maps(query, key, token, scale=scale)]
    with rc_context({"font.size": 9, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(10, 3.4), dpi=200, layout="constrained")
        for ax, panel, title, caption in zip(figure.subplots(1, 3), panels, TITLES, CAPTIONS, strict=True):
            signed = bool((panel < 0).any())
            limit = panel.abs().max().item()
            colors = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if signed else {"cmap": "viridis", "vmin": 0}
            ring = "#212529" if signed else "#ff6b4a"
            drawn = ax.imshow(panel.numpy(), interpolation="none", **colors)
            ax.plot(token[1], token[0], marker="o", markersize=7, markerfacecolor="none", markeredgecolor=ring)
            ax.set(xticks=[], yticks=[])
            ax.set_title(title, fontsize=10, fontweight="bold", color="#343a40")
            ax.set_xlabel(caption, color="#343a40")
            bar = figure.colorbar(drawn, ax=ax, shrink=0.8, pad=0.02)
            bar.ax.tick_params(labelsize=7, color="#343a40")
            bar.outline.set_visible(False)
            for spine in ax.spines.values():
                spine.set_visible(False)
        figure.suptitle(
            "the weights of one query over all keys, as multiples of an even share", fontsize=9, color="#343a40"
        )
        figure.savefig(path, facecolor="white")
    return Path(path)
