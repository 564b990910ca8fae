"""Trajectory Attention: tokens along paths attend to each other over frames."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..edits import attend_along, path_tokens
from ..registry import recipe


@recipe(
    "Trajectory Attention",
    "xizaoqu/TrajectoryAttntion@ba4ff3f",
    "exact",
    hosts="a branch beside temporal attention",
    needs="paths of pixels; a trained branch",
    cost="attention over frames for each path",
    recorded="dit_trajectory",
)
def trajectory_attention(
    hidden: Tensor,
    paths: Tensor,
    visible: Tensor,
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
    projections: tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module, torch.nn.Module],
    heads: int,
    invisible: str = "mask",
) -> Tensor:
    """Output of the branch, to be added to temporal attention.

    Args:
        hidden: `[B, frames, tokens, C]`.
        paths: x and y in pixels, `[frames, paths, 2]`.
        visible: `[frames, paths]`.
        grid: rows and columns of tokens.
        size: height and width in pixels.
        projections: to queries, keys, values, and out.
        heads: of the attention.
        invisible: "mask" hides them, "zero" makes them zeros that are keys, as the authors do.
    """
    to_q, to_k, to_v, to_out = projections

    def attend(x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (to_q, to_k, to_v))
        seen = None if mask is None else mask[:, None, None]
        return to_out(scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))

    return attend_along(hidden, path_tokens(paths, grid, size), visible, attend, invisible=invisible)
