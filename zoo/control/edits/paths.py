"""Attention along trajectories, and to the first frame of a video."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...sites import Call, Schedule
from ..edit import Context, Edit
from ..rows import expand
from ..where import Where


def path_tokens(paths: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Tokens along trajectories, int64 `[frames, paths]`.

    Args:
        paths: x and y in pixels, `[frames, paths, 2]`.
        grid: rows and columns of tokens.
        size: height and width in pixels.
    """
    height, width = grid
    x = (paths[..., 0] * width / size[1]).floor().long().clamp(0, width - 1)
    y = (paths[..., 1] * height / size[0]).floor().long().clamp(0, height - 1)
    return y * width + x


def attend_along(
    x: Tensor, tokens: Tensor, visible: Tensor, attend: Callable[[Tensor, Tensor | None], Tensor], *, invisible="mask"
) -> Tensor:
    """Attention over frames along paths, scattered back as the mean of the paths through a token.

    Args:
        x: `[B, frames, tokens, C]`.
        tokens: int64 `[frames, paths]`, see `path_tokens`.
        visible: bool `[frames, paths]`.
        attend: of sequences `[B * paths, frames, C]` with a mask of visible keys, bool `[B * paths, frames]`, or None.
        invisible: "mask" hides them as keys; "zero" makes them zeros that are keys nevertheless, as the official code
            of Trajectory Attention does.

    Returns:
        `[B, frames, tokens, C]`; tokens without a visible path get 0.

    Raises:
        ValueError: another rule for what is invisible.
    """
    if invisible not in ("mask", "zero"):
        raise ValueError(f"invisible={invisible!r} must be 'mask' or 'zero'")
    batch, frames, count, channels = x.shape
    paths = tokens.shape[1]
    index = tokens.to(x.device)[None, :, :, None].expand(batch, -1, -1, channels)
    along = x.gather(2, index)  # [B, F, P, C]
    seen = visible.to(x.device, torch.bool)
    if invisible == "zero":
        along = along * seen[..., None].to(x)
    mask = None
    if invisible == "mask" and not bool(seen.all()):
        mask = seen.T.expand(batch, -1, -1).flatten(0, 1)
        mask = mask | ~mask.any(1, keepdim=True)  # a path that nobody sees is dropped below
    out = attend(along.transpose(1, 2).flatten(0, 1), mask).unflatten(0, (batch, paths)).transpose(1, 2)
    out = out * seen[..., None].to(out)
    total = out.new_zeros(batch, frames, count, out.shape[-1]).scatter_add(
        2, tokens.to(x.device)[None, :, :, None].expand(batch, -1, -1, out.shape[-1]), out
    )
    hits = out.new_zeros(frames, count).scatter_add(1, tokens.to(x.device), seen.to(out))
    return total / hits.clamp(min=1)[None, :, :, None]


class FirstFrame(Edit):
    """All frames attend to the keys and values of the first.

    Args:
        frames: frames that are folded into the batch, frame by frame within each prompt; None where a sequence holds
            the whole video.
        where, schedule: sites and steps. All rows are edited.

    Raises:
        ValueError: fewer than one frame.
    """

    guidance = "both"

    def __init__(self, frames: int | None = None, *, where: Where | None = None, schedule: Schedule | None = None):
        if frames is not None and frames < 1:
            raise ValueError(f"frames={frames} must be at least 1")
        self.frames = frames
        self.where, self.schedule = where or Where(kinds=("self",)), schedule or Schedule()

    def plan(self, context: Context) -> Context | None:
        grid = context.layout.grid_of(context.site)
        if self.frames is None and (grid is None or len(grid) != 3):
            raise ValueError(f"{context.site.path} does not attend over a whole video; give frames=")
        if self.frames is not None and context.rows.batch % self.frames:
            raise ValueError(f"a batch of {context.rows.batch} does not hold whole videos of frames={self.frames}")
        alone = self.frames == 1 or (self.frames is None and grid is not None and grid[0] == 1)
        return None if alone else context

    def qkv(self, call: Call, plan: Context) -> Call:
        if self.frames is not None:
            factor = call.query.shape[0] // plan.rows.batch
            first = expand([row - row % self.frames for row in range(plan.rows.batch)], factor)
            index = torch.tensor(first, device=call.key.device)
            return replace(call, key=call.key[index], value=call.value[index])
        span, grid = plan.span(call, "video", keys=True), plan.layout.grid_of(plan.site)
        if span is None or grid is None or call.mask is not None:
            return call
        tokens = grid[1] * grid[2]
        keep = [*range(span[0]), *range(span[0], span[0] + tokens), *range(span[1], call.key.shape[1])]
        return replace(call, key=call.key[:, keep], value=call.value[:, keep])
