"""Maps of words, observed as channels of the values, and masks made of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from ...sites import Call, Schedule
from ...sites.site import Site
from ..edit import Context, Edit
from ..regions import gaussian_blur, normalize
from ..where import Where


class WordMask(Edit):
    """Observes how much the tokens of the grid attend to words: mean over heads, layers and steps.

    A word is a column of ones beside the values; no map of queries x keys is made or kept. Gradients flow into `maps`
    when they are on.

    Args:
        words: of the Control; one map each.
        branch: name of the prompt; all rows when None.
        threshold: of `value`, on normalized maps.
        normalize: "max", "minmax" or "none".
        smooth: size and sigma of a Gaussian, before normalizing.
        pool: size of a maximum over neighbors, before normalizing.
        grid: tokens of the maps; the largest grid seen when None, others are interpolated.
        layers: numbers of the layers that are observed; all when None.
        where, schedule, guidance: sites, steps and rows.

    Attributes:
        maps: `[rows, words, *grid]`, float32.
    """

    def __init__(
        self,
        *words: str,
        branch: str | None = None,
        threshold: float = 0.3,
        normalize: str = "max",
        smooth: tuple[int, float] | None = None,
        pool: int = 1,
        grid: tuple[int, ...] | None = None,
        layers: Collection[int] | None = None,
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "cond",
    ):
        if not words:
            raise ValueError("a WordMask needs words of the Control")
        self.words, self.branch, self.branches = words, branch, () if branch is None else (branch,)
        self.threshold, self.normalize, self.smooth, self.pool = threshold, normalize, smooth, pool
        self.where, self.schedule = where or Where(kinds=("cross", "joint"), layers=layers), schedule or Schedule()
        self.grid, self.guidance = grid, guidance
        self.begin()

    def sites(self, sites: Sequence[Site]) -> list[Site]:
        # sites over some axes of the grid alone attend in other sequences than the batch's
        return [s for s in super().sites(sites) if s.axes is None and s.operations[0].main != "audio"]

    def begin(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def plan(self, context: Context) -> tuple:
        rows = context.rows.of(self.branch, self.guidance)
        return (context, rows) if rows else None  # type: ignore[return-value]

    def columns(self, call: Call, plan: tuple) -> Tensor | None:
        context, _ = plan
        span, image = context.span(call, "text", keys=True), context.span(call, "image", keys=False)
        if span is None or image is None or context.layout.grid_of(context.site) is None:
            return None
        columns = torch.zeros(call.key.shape[1], len(self.words), device=call.query.device)
        for number, word in enumerate(self.words):
            columns[context.places_of([word], span), number] = 1
        return columns

    @torch.compiler.disable
    def read(self, call: Call, plan: tuple, maps: Tensor) -> None:
        context, rows = plan
        first, end = context.span(call, "image", keys=False)  # type: ignore[misc]
        grid = context.layout.grid_of(context.site)
        assert grid is not None
        found = maps[list(rows), first:end].float().mean(2).transpose(1, 2).unflatten(-1, grid)  # [rows, words, *grid]
        if self.total is not None and self.grid is None and found[0, 0].numel() > self.total[0, 0].numel():
            self.total = resize(self.total, found.shape[2:])
        target = self.grid or (found if self.total is None else self.total).shape[-len(grid) :]
        found = resize(found, target)
        self.total = found if self.total is None else self.total + found
        self.count += 1

    @property
    def maps(self) -> Tensor:
        if self.total is None:
            raise ValueError(f"{self} has seen nothing yet; run the generator under the Control first")
        return self.total / self.count

    @property
    def scores(self) -> Tensor:
        """Maps of all words together, smoothed, pooled and normalized, `[rows, *grid]`."""
        maps = self.maps.sum(1)
        if self.smooth is not None:
            maps = gaussian_blur(maps, *self.smooth)
        if self.pool > 1:
            flat = maps.flatten(0, -3)[:, None]
            maps = max_pool2d(flat, self.pool, stride=1, padding=self.pool // 2).reshape(maps.shape)
        return normalize(maps, self.normalize, tuple(range(1, maps.dim())))

    @property
    def masks(self) -> Tensor:
        """Masks of scores above the threshold, bool `[rows, *grid]`."""
        return self.scores > self.threshold

    @property
    def value(self) -> Tensor:
        """Masks of all rows together, bool `[*grid]`, for `where_tokens=` of other edits."""
        return self.masks.any(0)

    def __str__(self) -> str:
        return f"WordMask{self.words}"


class Kept:
    """The complement of a mask that is made later, for `where_tokens=`.

    Args:
        mask: a `WordMask`.
    """

    def __init__(self, mask: Any):
        self.mask = mask

    @property
    def value(self) -> Tensor:
        return ~self.mask.value


def resize(maps: Tensor, grid: Sequence[int]) -> Tensor:
    """Maps `[rows, words, *grid]` on another grid, linearly."""
    if maps.shape[2:] == tuple(grid):
        return maps
    return interpolate(maps, size=tuple(grid), mode="trilinear" if len(grid) == 3 else "bilinear")
