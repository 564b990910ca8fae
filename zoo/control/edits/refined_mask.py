"""Masks of words whose maps are refined by self-attention, step by step (ViMAEdit, LOCATEdit)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...sites import Call, Schedule
from ..channels import logits, scale_of
from ..edit import Context, Edit
from ..regions import normalize
from ..where import Where
from .refine_maps import attend_mean, smooth_on_graph, spread

METHODS = ("spread", "graph")


class RefinedMask(Edit):
    """Maps of words at one grid, refined by the self-attention of that grid and added up over the steps.

    Args:
        words: of the Control; their maps are added up.
        branch: name of the prompt; all rows when None.
        scale: latent pixels per token of the refined grid; self-attentions of this scale refine.
        cross_scales: those of the cross-attentions, resized to the grid, nearest.
        method: "spread" (`spread`, no map is made) or "graph" (`smooth_on_graph`, a map of the grid with itself).
        rounds, keep: of "spread".
        slope, weight: of "graph".
        schedule, guidance: steps and rows.

    Attributes:
        maps: `[rows, height, width]`, float32.

    Raises:
        ValueError: no word, or an unknown method.
    """

    def __init__(
        self,
        *words: str,
        branch: str | None = None,
        scale: int = 2,
        cross_scales: Sequence[int] = (2, 4),
        method: str = "spread",
        rounds: int = 5,
        keep: float = 0.5,
        slope: float = 4.0,
        weight: float = 0.5,
        schedule: Schedule | None = None,
        guidance: str = "cond",
    ):
        if not words or method not in METHODS:
            raise ValueError(f"words={words} must name one at least, and method={method!r} be one of {METHODS}")
        self.words, self.branch, self.branches = words, branch, () if branch is None else (branch,)
        self.scale, self.method, self.rounds, self.keep = scale, method, rounds, keep
        self.slope, self.weight, self.schedule, self.guidance = slope, weight, schedule or Schedule(), guidance
        self.needs = "a solve on the graph of self-attention" if method == "graph" else ""
        self._cross = Where(kinds=("cross",), places=("down", "up"), scales=tuple(cross_scales))
        self._self = Where(kinds=("self",), places=("down", "up"), scales=(scale,))
        if method == "graph":
            self.where = self._self
        self.begin()

    def sites(self, sites: Sequence[Any]) -> list[Any]:
        chosen = {id(site) for where in (self._cross, self._self) for site in where.select(sites)}
        return [site for site in sites if id(site) in chosen and site.axes is None]

    def begin(self) -> None:
        self.total: Tensor | None = None
        self._open()

    def _open(self) -> None:
        self._found: list[Tensor] = []
        self._operations: list[tuple[Tensor, Tensor, float]] = []
        self._step: int | None = None
        self._grid: tuple[int, ...] | None = None

    def plan(self, context: Context) -> tuple | None:
        if (step := context.moment.step or 0) != self._step:
            self._close()
            self._step = step
        rows = context.rows.of(self.branch, self.guidance)
        if not rows:
            return None
        if 2**context.site.level == self.scale:
            self._grid = context.layout.grid_of(context.site)
        return context, rows

    def columns(self, call: Call, plan: tuple) -> Tensor | None:
        context, _ = plan
        span = context.span(call, "text", keys=True)
        if context.site.kind != "cross" or span is None:
            return None
        column = torch.zeros(call.key.shape[1], 1, device=call.query.device)
        column[context.places_of(self.words, span)] = 1
        return column

    @torch.compiler.disable
    def read(self, call: Call, plan: tuple, maps: Tensor) -> None:
        context, rows = plan
        grid = context.layout.grid_of(context.site)
        self._found.append(maps[list(rows)].float().mean(2)[..., 0].unflatten(-1, grid).detach())

    @torch.compiler.disable
    def qkv(self, call: Call, plan: tuple) -> Call:
        context, rows = plan
        if context.site.kind == "self":
            query, key = (x[list(rows)].detach() for x in (call.query, call.key))
            self._operations.append((query, key, scale_of(call)))
        return call

    def _close(self) -> None:
        """Refines what the last forward showed."""
        if self._found and self._operations and self._grid is not None:
            grid = self._grid
            small = [interpolate(x[:, None], size=grid)[:, 0] for x in self._found]
            mean = torch.stack(small).mean(0).flatten(1)  # [rows, tokens]
            if self.method == "spread":
                attend = attend_mean(self._operations)
                refined = spread(mean[..., None], attend, rounds=self.rounds, keep=self.keep)[..., 0]
            else:
                graph = sum(logits(q, k, s).softmax(-1).mean(1) for q, k, s in self._operations)
                graph = graph / len(self._operations)
                refined = smooth_on_graph(mean, graph, slope=self.slope, weight=self.weight)
            refined = refined.unflatten(-1, grid)
            self.total = refined if self.total is None else self.total + refined
        self._open()

    @property
    def maps(self) -> Tensor:
        self._close()
        if self.total is None:
            raise ValueError(f"{self} has seen nothing yet; run the generator under the Control first")
        return self.total

    def above(self, threshold: float) -> Above:
        """The mask of what is above a threshold, for `Blend`, `VirtualInversion` and `where_tokens=`."""
        return Above(self, threshold)

    def __str__(self) -> str:
        return f"RefinedMask{self.words}"


class Above:
    """A mask that is made later.

    Args:
        source: a `RefinedMask`.
        threshold: of its maps between minimum and maximum.
    """

    smooth = True  # `Blend` takes the mask as it is

    def __init__(self, source: RefinedMask, threshold: float):
        self.source, self.threshold = source, threshold

    @property
    def value(self) -> Tensor | None:
        """Masks of all rows together, bool `[height, width]`; None before the first step that the source observes."""
        if self.source.total is None and not self.source._found:
            return None
        maps = self.source.maps
        return (normalize(maps, "minmax") > self.threshold).any(0)
