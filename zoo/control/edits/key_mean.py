"""Keys of a group of tokens moved towards or away from their mean (GRAG)."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...sites import Call, Schedule
from ..edit import Context, Edit
from ..where import Where


class KeyMean(Edit):
    """`k <- scale * mean + delta * (k - mean)` over the keys of a stream, per row and head.

    Group relative attention guidance (GRAG), after norms and rotary embeddings. On all keys of an operation, `scale`
    alone has no effect: the softmax does not see a shift.

    Args:
        stream: "reference", "text", "image" or "all".
        scale: of the mean; 1 is neutral.
        delta: of the difference to the mean; 1 is neutral.
        where, schedule, guidance: sites, steps and rows.
    """

    def __init__(
        self,
        stream: str = "reference",
        scale: float = 1.0,
        delta: float = 1.0,
        *,
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "both",
    ):
        self.stream, self.scale, self.delta = stream, scale, delta
        self.where, self.schedule = where or Where(kinds=("self", "joint")), schedule or Schedule()
        self.guidance = guidance

    def check(self, control) -> None:
        sites = self.where.select(control.sites)
        if self.stream in ("reference", "text") and not any(self.stream in site.streams for site in sites):
            raise ValueError(f"no attention of this generator has keys of the stream {self.stream!r}")

    def plan(self, context: Context) -> tuple | None:
        neutral = self.scale == 1 and self.delta == 1
        return None if neutral else (context, context.rows.of(None, self.guidance))

    def qkv(self, call: Call, plan: tuple) -> Call:
        context, rows = plan
        span = (0, call.key.shape[1]) if self.stream == "all" else context.span(call, self.stream, keys=True)
        if span is None:
            return call
        index = torch.tensor(rows, device=call.key.device)
        some = call.key[index, span[0] : span[1]]
        mean = some.mean(1, keepdim=True)
        key = call.key.clone()
        key[index, span[0] : span[1]] = self.scale * mean + self.delta * (some - mean)
        return replace(call, key=key)

    def __str__(self) -> str:
        return f"KeyMean({self.stream!r}, {self.scale}, {self.delta})"
