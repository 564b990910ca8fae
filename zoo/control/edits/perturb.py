"""Maps pulled towards the identity or towards the mean: perturbed guidance, energy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...sites import Call, Schedule
from ..channels import CHUNK, logits, scale_of
from ..edit import Context, Edit
from ..where import Where

TOWARDS = ("value", "mean", "self_and_text")


class Perturb(Edit):
    """`A <- (1 - u) A + u I`, head by head, for the tokens of the grid: `out <- (1 - u) out + u value`.

    Args:
        strength: u; 0 is neutral. In 0..1, but for "mean".
        heads: layer → heads; all of all sites when None.
        towards: "value" is the identity; "mean" the uniform map; "self_and_text" sees itself and all text tokens under
            one softmax, as diffusers' older processor of SD3 does.
        where, schedule, guidance: sites, steps and rows.

    Raises:
        ValueError: a strength outside of 0..1, or another map.
    """

    def __init__(
        self,
        strength: float = 1.0,
        heads: Mapping[int, Collection[int]] | None = None,
        *,
        towards: str = "value",
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "both",
    ):
        if towards not in TOWARDS or (towards != "mean" and not 0 <= strength <= 1):
            raise ValueError(f"strength={strength} must be in 0..1 and towards={towards!r} one of {TOWARDS}")
        self.strength, self.towards = strength, towards
        self.heads = None if heads is None else {layer: tuple(sorted(some)) for layer, some in heads.items()}
        layers = None if self.heads is None else tuple(self.heads)
        self.where = where or Where(kinds=("self", "joint"), layers=layers)
        self.schedule, self.guidance = schedule or Schedule(), guidance

    def check(self, control) -> None:
        for site in self.where.select(control.sites):
            some = (self.heads or {}).get(site.layer, ())
            if some and not 0 <= some[0] <= some[-1] < site.heads:
                raise ValueError(f"heads={{{site.layer}: {list(some)}}} must be within the {site.heads} heads")

    def plan(self, context: Context) -> tuple | None:
        some = None if self.heads is None else self.heads.get(context.site.layer, ())
        if self.strength == 0 or some == ():
            return None
        strength = torch.zeros(context.site.heads)
        strength[slice(None) if some is None else list(some)] = self.strength
        return context, context.rows.of(None, self.guidance), strength

    def out(self, call: Call, plan: tuple, out: Tensor) -> Tensor:
        context, rows, strength = plan
        queries, keys = (context.span(call, "image", keys=k) for k in (False, True))
        if queries is None or keys is None:
            return out
        value = call.value
        if value.shape[2] != out.shape[2]:
            value = value.repeat_interleave(out.shape[2] // value.shape[2], dim=2)
        index = torch.tensor(rows, device=out.device)
        mine = out[index, queries[0] : queries[1]]
        if self.towards == "mean":
            other = value[index, keys[0] : keys[1]].mean(1, keepdim=True)
        elif self.towards == "value":
            other = value[index, keys[0] : keys[1]]
        else:
            other = _itself_and_others(replace(call, value=value), queries, keys)[index]
        out = out.clone()
        out[index, queries[0] : queries[1]] = torch.lerp(mine, other.expand_as(mine), strength.to(out)[:, None])
        return out


def _itself_and_others(call: Call, queries: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """Each token of the grid sees itself and the tokens that are not on the grid."""
    others, theirs = (torch.cat([x[:, : keys[0]], x[:, keys[1] :]], 1) for x in (call.key, call.value))
    parts = []
    for first in range(queries[0], queries[1], CHUNK):
        end = min(first + CHUNK, queries[1])
        query = call.query[:, first:end]
        shifted = slice(first - queries[0] + keys[0], end - queries[0] + keys[0])
        own = (query * call.key[:, shifted]).sum(-1).transpose(1, 2)[..., None] * scale_of(call)
        weights = torch.cat([own, logits(query, others, scale_of(call)).to(own)], -1).softmax(-1)  # [B, h, n, 1 + m]
        text = torch.einsum("bhnm,bmhd->bnhd", weights[..., 1:], theirs)
        parts.append(weights[..., 0].transpose(1, 2)[..., None] * call.value[:, shifted] + text)
    return torch.cat(parts, 1)
