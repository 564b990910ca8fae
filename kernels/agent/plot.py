"""Pictures of agent attention: what one query attends to, and through which agents."""

from __future__ import annotations

import os
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from ..common.calling import resolve_scale

TITLES = ("softmax attention", "the query's agents", "what its first agent gathers", "agent attention")


@torch.no_grad()
def attention_maps(
    query: Tensor, key: Tensor, agent: Tensor, token: tuple[int, int], *, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of one query of one head, each summing to one.

    Args:
        query, key: `[H, W, head_dim]`.
        agent: `[agents, head_dim]`.
        token: row and column of the query.
        scale: factor on all logits; head_dim ** -0.5 when None.

    Returns:
        softmax attention over keys `[H, W]`, the query's weights over agents `[agents]`, the weights over keys
        `[H, W]` of the agent that weighs most, and agent attention over keys `[H, W]`.
    """
    factor: float = resolve_scale(query, scale)
    keys, own = key.flatten(0, 1), query[token]
    dense = (keys @ own * factor).softmax(0)
    weights = (agent @ own * factor).softmax(0)
    gather = (agent @ keys.mT * factor).softmax(-1)  # [agents, keys]
    maps = (dense, gather[weights.argmax()], weights @ gather)
    dense, first, through = (x.view(key.shape[:2]) for x in maps)
    return dense, weights, first, through


def plot_agent_attention(
    query: Tensor,
    key: Tensor,
    agent: Tensor,
    *,
    token: tuple[int, int],
    path: str | os.PathLike,
    scale: float | None = None,
) -> Path:
    """Draw what one query attends to by softmax and by agent attention, and the agents between.

    Args:
        query, key: `[H, W, head_dim]`, one head of one image.
        agent: `[agents, head_dim]`; a square number of them, in the C order of their grid.
        token: row and column of the query.
        path: where the picture goes; its suffix says the format.
        scale: factor on all logits; head_dim ** -0.5 when None.

    Returns:
        `path`.

    Raises:
        ValueError: agents that form no square, or a token outside the grid.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    side = isqrt(len(agent))
    if side * side != len(agent):
        raise ValueError(f"agent.shape={tuple(agent.shape)} must hold a square number of agents")
    if not all(0 <= t < n for t, n in zip(token, query.shape[:2], strict=True)):
        raise ValueError(f"token={token} must lie in the grid of query.shape={tuple(query.shape)}")
    dense, weights, first, through = attention_maps(query, key, agent, token, scale=scale)
    panels = (dense, weights.view(side, side), first, through)
    tokens, agents = query.shape[:2].numel(), len(agent)
    captions = (
        f"{tokens:,} keys",
        f"{agents} weights",
        f"{tokens:,} keys, shared by all queries",
        f"a mix of the maps of {agents} agents",
    )
    with rc_context({"font.size": 9, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(10, 3), dpi=200, layout="constrained")
        for ax, panel, title, caption in zip(figure.subplots(1, 4), panels, TITLES, captions, strict=True):
            ax.imshow(panel.double().cpu().numpy(), cmap="viridis", vmin=0, interpolation="none")
            row, column = (t * n / m for t, n, m in zip(token, panel.shape, query.shape[:2], strict=True))
            if panel.shape == query.shape[:2]:
                ax.plot(column, row, marker="o", markersize=7, markerfacecolor="none", markeredgecolor="#ff6b4a")
            ax.set(xticks=[], yticks=[])
            ax.set_title(title, fontsize=10, fontweight="bold", color="#343a40")
            ax.set_xlabel(caption, color="#343a40")
            for spine in ax.spines.values():
                spine.set_visible(False)
        figure.savefig(path, facecolor="white")
    return Path(path)
