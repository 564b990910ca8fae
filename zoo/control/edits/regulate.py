"""Logits of target words raised by a few Gaussians so that each word gets its share (Attention Regulation)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...sites import Call, Schedule
from ..channels import logits, scale_of
from ..edit import Context, Edit
from ..where import Where


def regulation_loss(
    maps: Tensor, weights: Tensor, *, threshold: float, gamma: float = 1.0, delta: float = 80.0, epsilon: float = 0.09
) -> Tensor:
    """`γ mean (q90(A_k) - .9)² + δ mean (mean A_k - threshold / n)² + ε mean w²`.

    Args:
        maps: of the n target words, `[B heads, height, width, n]`.
        weights: w of the Gaussians.
        threshold: `min(1, 0.2 n)` by the authors.
        gamma, delta, epsilon: of the terms.
    """
    flat = maps.flatten(1, 2)
    high = torch.quantile(flat, 0.9, dim=1)
    peak = (high - 0.9).square().mean()
    share = (flat.mean(1) - threshold / maps.shape[-1]).square().mean()
    return gamma * peak + delta * share + epsilon * weights.square().mean()


def gaussians(size: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Gaussians of width W // 16 (1 at least) on a grid of centers two widths apart, `[centers, height, width]`."""
    height, width = size
    sigma = max(width // 16, 1)
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    centers = torch.cartesian_prod(y[:: 2 * sigma], x[:: 2 * sigma])
    square = (y[None, :, None] - centers[:, 0, None, None]) ** 2 + (x[None, None] - centers[:, 1, None, None]) ** 2
    return torch.exp(-square / (2 * sigma**2))


def regulate(
    logits: Tensor,
    words: tuple[int, ...],
    size: tuple[int, int],
    *,
    iterations: int = 20,
    rate: float = 100.0,
    seed: int = 0,
) -> tuple[Tensor, list[float]]:
    """Addition to the logits of some words, optimized, and the losses on the way.

    Args:
        logits: of cross-attention, `[B heads, tokens of the grid, text tokens]`.
        words: target tokens.
        size: rows and columns of the grid.
        iterations, rate: of the gradient steps `w <- w - B heads rate ∇L`.
        seed: of the random start; the authors do not seed.

    Returns:
        the addition `[B heads, tokens, words]` of the least loss, and all losses.
    """
    shapes = gaussians(size, logits.device).to(logits)
    generator = torch.Generator(logits.device).manual_seed(seed)
    shape = (len(logits), len(shapes), 1, 1, len(words))
    w = torch.rand(shape, generator=generator, device=logits.device, dtype=logits.dtype)
    threshold = min(1.0, 0.2 * len(words))
    best, losses = None, []
    with torch.enable_grad():
        for _ in range(iterations):
            w = w.detach().requires_grad_()
            added = (w * shapes[None, ..., None]).sum(1).flatten(1, 2)  # [B heads, tokens, words]
            edited = logits.detach().clone()
            edited[..., list(words)] += added
            maps = edited.softmax(-1)[..., list(words)].unflatten(1, size)
            loss = regulation_loss(maps, w, threshold=threshold)
            if not losses or float(loss.detach()) < min(losses):
                best = added.detach()
            losses.append(float(loss.detach()))
            (gradient,) = torch.autograd.grad(loss, w)
            w = w - len(logits) * rate * gradient
    assert best is not None
    return best, losses


class Regulate(Edit):
    """Attention to text with regulated logits of target words; columns of the ends are the unedited map's.

    The addition of a step is a quarter that of the step before, and decays by 0.99 a step.

    Args:
        words: of the Control.
        ends: tokens whose columns stay, of start and end of the text.
        iterations, rate, seed: see `regulate`; iterations=0 is neutral.
        mix: share of the new addition.
        where, schedule, guidance: sites, steps and rows.
    """

    owner = True
    needs = "cross-attention maps of the edited layers, optimized in each step"

    def __init__(
        self,
        *words: str,
        ends: Sequence[int] = (0,),
        iterations: int = 20,
        rate: float = 100.0,
        seed: int = 0,
        mix: float = 0.75,
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "cond",
    ):
        if not words:
            raise ValueError("Regulate needs words of the Control")
        self.words, self.ends, self.mix, self.guidance = words, tuple(ends), mix, guidance
        self.iterations, self.rate, self.seed = iterations, rate, seed
        self.where, self.schedule = where or Where(kinds=("cross",)), schedule or Schedule()
        self.losses: dict[str, list[float]] = {}
        self.begin()

    def begin(self) -> None:
        self._last: dict[str, Tensor] = {}

    def plan(self, context: Context) -> tuple | None:
        rows = context.rows.of(None, self.guidance)
        return (context, rows) if rows and self.iterations else None

    @torch.compiler.disable
    def attend(self, call: Call, plan: Any, rows: Sequence[int], following: Callable[[Call], Tensor]) -> Tensor:
        context, chosen = plan
        grid = context.layout.grid_of(context.site)
        span = context.span(call, "text", keys=True)
        if grid is None or len(grid) != 2 or span is None or span != (0, call.key.shape[1]):
            return following(call)
        out = following(call)
        mine = [i for i, row in enumerate(rows) if row in chosen]
        words = tuple(context.places_of(self.words, span))
        plain = logits(call.query[mine], call.key[mine], scale_of(call))  # [B, heads, tokens, text]
        flat = plain.flatten(0, 1)
        new, losses = regulate(flat, words, grid, iterations=self.iterations, rate=self.rate, seed=self.seed)
        path, last = call.site.path, self._last.get(call.site.path)
        added = new if last is None or last.shape != new.shape else (1 - self.mix) * last + self.mix * new
        self._last[path], self.losses[path] = added, losses
        edited = flat.clone()
        edited[..., list(words)] += added * 0.99 ** (context.moment.step or 0)
        maps, before = edited.softmax(-1), flat.softmax(-1)
        maps[..., list(self.ends)] = before[..., list(self.ends)]
        value = call.value[mine].transpose(1, 2).flatten(0, 1)
        attended = (maps.to(value) @ value).unflatten(0, plain.shape[:2]).transpose(1, 2)
        return out.index_copy(0, torch.tensor(mine, device=out.device), attended.to(out))
