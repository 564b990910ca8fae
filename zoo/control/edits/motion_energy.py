"""Temporal attention led by that of an earlier block, with the energy that motion needs (BroadWay)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...sites import Call, Schedule
from ...sites.site import Site
from ..channels import logits, scale_of
from ..edit import Context, Edit
from ..where import Where


def energy(maps: Tensor) -> Tensor:
    """Mean over rows of the sum of squares of maps `[…, frames, frames]`."""
    return maps.square().sum(-1).mean()


def high_band(frames: int, tau: int) -> Tensor:
    """Frequencies `[frames/2 - tau, frames/2 + tau]` of the plain order, whose middle is the highest; bool `[frames]`.

    Raises:
        ValueError: fewer frames than the band has frequencies.
    """
    if not 0 <= tau <= (frames - 1) // 2:
        raise ValueError(f"tau={tau} must be in 0..{(frames - 1) // 2} for {frames} frames")
    index = torch.arange(frames)
    return (index >= frames // 2 - tau) & (index <= frames // 2 + tau)


def enhance(maps: Tensor, first: Tensor, cond: Tensor | slice, *, alpha: float, beta: float, tau: int) -> Tensor:
    """Maps led towards others, their high band along the keys raised to the energy before, at least by a factor.

    Args:
        maps: `[rows, …, frames, frames]`.
        first: of the earlier block, of the same shape.
        cond: the rows whose energy counts.
        alpha: share of the way to `first`.
        beta: least factor on the high band.
        tau: half width of the band.
    """
    frames = maps.shape[-1]
    high = high_band(frames, tau).to(maps.device)
    wanted = energy(maps[cond])
    maps = maps + alpha * (first - maps)
    spectrum = torch.fft.fft(maps, dim=-1)
    parts = spectrum[cond].abs().square() / frames  # Parseval
    above, below = ((parts * band).sum(-1).mean() for band in (high, ~high))
    factor = ((wanted - below).clamp(min=0) / above).sqrt().clamp(min=beta)
    enhanced = torch.fft.ifft(torch.where(high, factor * spectrum, spectrum), dim=-1).real
    return enhanced / enhanced.sum(-1, keepdim=True)


class MotionEnergy(Edit):
    """Temporal attention of up blocks as `enhance` makes it, from the maps of the first of these blocks.

    Maps of frames x frames are made for each pixel and head; those of the first block are interpolated over pixels.

    Args:
        alpha: share of the way to the first block's maps; 0 with beta of at most 1 is neutral.
        beta: least factor on the high band.
        tau: half width of the band, of at least 2 tau + 1 frames.
        blocks: numbers of the up blocks; the first leads.
        schedule: steps. All rows are edited; the energy is that of the conditional ones, or of all where a forward
            has none.
    """

    owner = True
    guidance = "both"
    needs = "energies of temporal attention, maps of frames x frames"

    def __init__(
        self,
        alpha: float,
        beta: float,
        tau: int,
        *,
        blocks: Sequence[int] = (1, 2, 3),
        schedule: Schedule | None = None,
    ):
        if not 0 <= alpha <= 1 or beta < 0 or not blocks:
            raise ValueError(f"alpha={alpha} must be in 0..1, beta={beta} 0 or more, and blocks={blocks} not empty")
        self.alpha, self.beta, self.tau, self.first = alpha, beta, tau, blocks[0]
        self.where, self.schedule = Where(kinds=("self",), places=("up",), blocks=blocks), schedule or Schedule()
        self._maps: dict[str, tuple[dict[int, int], Sequence[int], Tensor]] = {}

    def sites(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in super().sites(sites) if site.axes == (0,)]

    def leader(self, site: Site) -> str:
        """Path of the module of the first block that corresponds to a site."""
        place, _, rest = site.path.partition("up_blocks.")
        return f"{place}up_blocks.{self.first}.{rest.partition('.')[2]}"

    def check(self, control: Any) -> None:
        found = {site.path: site for site in self.sites(control.sites)}
        for site in found.values():
            leader = found.get(self.leader(site))
            if leader is None or leader.heads != site.heads:
                raise ValueError(f"{site.path} needs {self.leader(site)} with as many heads, {site.heads}, to lead it")

    def begin(self) -> None:
        self._maps = {}

    def plan(self, context: Context) -> tuple | None:
        if self.alpha == 0 and self.beta <= 1:
            return None
        frames, *size = context.layout.levels[context.site.level]
        high_band(frames, self.tau)
        cond = context.rows.of() or context.rows.of(None, "both")
        return size, cond

    def attend(self, call: Call, plan: Any, rows: Sequence[int], following: Callable[[Call], Tensor]) -> Tensor:
        size, cond = plan
        maps = logits(call.query, call.key, scale_of(call)).softmax(-1).unflatten(0, (len(rows), -1))
        leader = self.leader(call.site)
        if leader == call.site.path:  # runs before the others
            self._maps[leader] = ({row: i for i, row in enumerate(rows)}, size, maps)
        places, led_by, first = self._maps[leader]
        first = resize_pixels(first[[places[row] for row in rows]], led_by, size)
        counted = torch.tensor([row in cond for row in rows], device=maps.device)
        enhanced = enhance(maps, first, counted, alpha=self.alpha, beta=self.beta, tau=self.tau).flatten(0, 1)
        return torch.einsum("bhnm,bmhd->bnhd", enhanced, call.value.to(enhanced)).to(call.value)


def resize_pixels(maps: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Maps `[rows, pixels, …]` of a grid of pixels on another, linearly; what adds up to 1 still does."""
    if tuple(before) == tuple(after):
        return maps
    planes = maps.flatten(2).transpose(1, 2).unflatten(-1, tuple(before))
    resized = interpolate(planes, size=tuple(after), mode="bilinear")
    return resized.flatten(2).transpose(1, 2).unflatten(-1, maps.shape[2:])
