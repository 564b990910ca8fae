"""Rotary positions of chosen tokens, taken from other tokens (DiTraj)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...sites import Schedule
from ...sites.models import models_of
from ..edit import Context, Edit


def anchored(tracks: Tensor, anchor: int) -> Tensor:
    """For each token of a video, the token whose spatial position it takes; itself outside of the track.

    Args:
        tracks: bool `[frames, height, width]`, the box in every frame.
        anchor: frame whose box gives the positions.

    Returns:
        float `[frames, height, width, 2]`, row and column. Boxes of other sizes are mapped linearly.

    Raises:
        ValueError: a frame without a box, or an anchor that is no frame.
    """
    frames, height, width = tracks.shape
    if not 0 <= anchor < frames:
        raise ValueError(f"anchor={anchor} must be one of the {frames} frames")
    if not tracks.flatten(1).any(1).all():
        raise ValueError("tracks must hold a box in every frame")
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).double()
    places = grid.expand(frames, -1, -1, -1).clone()

    def bounds(frame: int) -> tuple[Tensor, Tensor]:
        found = tracks[frame].nonzero().double()
        return found.amin(0), found.amax(0)

    low, high = bounds(anchor)
    for frame in range(frames):
        first, last = bounds(frame)
        ratio = (high - low) / (last - first).clamp(min=1)
        inside = tracks[frame]
        places[frame][inside] = low + (grid[inside] - first) * torch.where(last == first, 1.0, ratio)
    return places


class CopySpatialPositions(Edit):
    """The spatial rotary angles of a box's tokens become those of the box in one anchor frame; time stays (Wan).

    Args:
        tracks: the box in every token frame, bool `[frames, height, width]` on the grid of tokens.
        anchor: frame that gives the positions; the middle one when None.
        schedule: steps. All rows are edited.
    """

    guidance = "both"

    def __init__(self, tracks: Tensor, *, anchor: int | None = None, schedule: Schedule | None = None):
        self.tracks, self.schedule = tracks.bool(), schedule or Schedule()
        self.places = anchored(self.tracks, len(tracks) // 2 if anchor is None else anchor)

    def sites(self, sites: Sequence[Any]) -> list[Any]:
        return []

    def check(self, control: Any) -> None:
        for model in models_of(control.pipe_or_model).values():
            if not all(hasattr(getattr(model, "rope", None), name) for name in ("t_dim", "h_dim", "w_dim")):
                raise ValueError(f"{type(model).__name__} has no rotary table of time, rows and columns; Wan has")

    def hooks(self, control: Any) -> list[Any]:
        return [model.rope.register_forward_hook(self._edit) for model in models_of(control.pipe_or_model).values()]

    def plan(self, context: Context) -> None:
        return None

    @torch.compiler.disable
    def _edit(self, rope: Any, args: tuple, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
        if not self.now:
            return None
        frames, height, width = self.tracks.shape
        if tables[0].shape[1] != frames * height * width:
            raise ValueError(f"tracks of {tuple(self.tracks.shape)} are not on the grid of {tables[0].shape[1]} tokens")
        return tuple(self._table(rope, table) for table in tables)  # type: ignore[return-value]

    def _table(self, rope: Any, table: Tensor) -> Tensor:
        frames, height, width = self.tracks.shape
        video = table.unflatten(1, (frames, height, width))
        rows = video[0, 0, :, 0, :, rope.t_dim : rope.t_dim + rope.h_dim]  # [height, 1, h_dim]
        columns = video[0, 0, 0, :, :, rope.t_dim + rope.h_dim :]
        places = self.places.round().long().to(table.device)
        moved = video.clone()
        moved[0, ..., rope.t_dim : rope.t_dim + rope.h_dim] = rows[places[..., 0]]
        moved[0, ..., rope.t_dim + rope.h_dim :] = columns[places[..., 1]]
        chosen = self.tracks.to(table.device)[None, ..., None, None]
        return torch.where(chosen, moved, video).flatten(1, 3)
