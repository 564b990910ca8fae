"""Queries, keys, values or outputs of one branch in another: injection, sharing, interpolation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...sites import Call, Schedule
from ..edit import PARTS, Context, Edit
from ..regions import to_grid
from ..rows import expand
from ..where import Where


class Share(Edit):
    """`x[to] <- (1 - m) x[to] + m x[source]` for x of queries, keys, values or outputs, at the tokens of a stream.

    "qk" injects the map, "kv" shares what is attended to, "q" alone injects structure.

    Args:
        what: letters of "qkv", or "out".
        stream: "image" (the grid), "text", or "all" tokens.
        source, to: names of the branches.
        mix: m, in 0..1; 0 is neutral.
        where_tokens: weight by token on the grid, `[height, width]` or `[frames, height, width]`, or an edit whose
            `value` is one (a `WordMask`); times mix.
        where, schedule, guidance: sites, steps and rows.

    Raises:
        ValueError: other letters, or a mix outside of 0..1.
    """

    def __init__(
        self,
        what: str = "qk",
        stream: str = "image",
        *,
        source: str = "source",
        to: str = "target",
        mix: float = 1.0,
        where_tokens: Any = None,
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "both",
    ):
        if what != "out" and (not what or set(what) - set(PARTS)):
            raise ValueError(f"what={what!r} must be letters of 'qkv', or 'out'")
        if not 0 <= mix <= 1 or stream not in ("image", "text", "all"):
            raise ValueError(f"mix={mix} must be in 0..1 and stream={stream!r} 'image', 'text' or 'all'")
        if where_tokens is not None and stream != "image":
            raise ValueError(f"where_tokens is on the grid, stream={stream!r} is not")
        self.what, self.stream, self.source, self.to, self.mix = what, stream, source, to, mix
        self.where_tokens = where_tokens
        self.where, self.schedule = where or Where(kinds=("self", "joint")), schedule or Schedule()
        self.guidance, self.branches = guidance, (source, to)

    def plan(self, context: Context) -> tuple | None:
        if self.mix == 0:
            return None
        weight = getattr(self.where_tokens, "value", self.where_tokens)
        if weight is not None:
            if (grid := context.layout.grid_of(context.site)) is None:
                raise ValueError(f"{context.site.path}: {context.layout.why}; where_tokens needs a grid")
            weight = to_grid(weight, grid)
        rows = context.rows
        return context, rows.of(self.source, self.guidance), rows.of(self.to, self.guidance), weight

    def _mixed(self, x: Tensor, call: Call, plan: tuple, *, keys: bool) -> Tensor:
        context, source, to, weight = plan
        factor = x.shape[0] // context.rows.batch
        whole = (0, x.shape[1])
        span = whole if self.stream == "all" else context.span(call, self.stream, keys=keys)
        if span is None:
            return x
        source, to = expand(source, factor), expand(to, factor)
        if weight is None and self.mix == 1 and span == whole:
            index = list(range(x.shape[0]))
            for a, b in zip(source, to, strict=True):
                index[b] = a
            return x[torch.tensor(index, device=x.device)]
        first, end = span
        part = torch.tensor(to, device=x.device)
        mine, theirs = x[part, first:end], x[torch.tensor(source, device=x.device), first:end]
        share = self.mix if weight is None else (self.mix * weight).to(x)[:, None, None]
        mixed = theirs if weight is None and self.mix == 1 else mine + share * (theirs - mine)
        if isinstance(share, Tensor):  # a - b + b is not a
            mixed = torch.where(share == 1, theirs, torch.where(share == 0, mine, mixed))
        x = x.clone()
        x[part, first:end] = mixed
        return x

    def qkv(self, call: Call, plan: tuple) -> Call:
        if self.what == "out":
            return call
        changes = {
            PARTS[letter]: self._mixed(getattr(call, PARTS[letter]), call, plan, keys=letter != "q")
            for letter in self.what
        }
        return replace(call, **changes)

    def out(self, call: Call, plan: tuple, out: Tensor) -> Tensor:
        return self._mixed(out, call, plan, keys=False) if self.what == "out" else out

    def __str__(self) -> str:
        return f"Share({self.what!r}, {self.source} → {self.to})"
