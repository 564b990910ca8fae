"""Several texts at once: cross-attention to each, composed by masks of pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...sites import Call, Schedule
from ..edit import Context, Edit
from ..regions import regions_to_grid
from ..where import Where


class Contexts(Edit):
    """`out <- out + sum_i weight_i mask_i (attention to text_i - base)` in cross-attention.

    Args:
        texts: `[texts, tokens, channels]`, encoded as the generator's own prompts, and projected where it projects text
            before its blocks (Wan, LTX).
        masks: `[texts, height, width]`, of pixels that read each text.
        weights: factor of each text; a number, `[texts]`, or a function of the step; 0 is neutral.
        base: "uncond" subtracts the output of the unconditional rows (SpaceTime attention), "own" that of the rows
            themselves, which replaces it where mask and weight are 1.
        where, schedule: sites and steps. The conditional rows are edited.

    Raises:
        ValueError: other than one mask for each text.
    """

    def __init__(
        self,
        texts: Tensor,
        masks: Tensor,
        weights: float | Tensor | Callable[[int], Tensor] = 1.0,
        *,
        base: str = "own",
        where: Where | None = None,
        schedule: Schedule | None = None,
    ):
        if texts.dim() != 3 or len(masks) != len(texts) or base not in ("own", "uncond"):
            raise ValueError(
                f"texts={tuple(texts.shape)} must be [texts, tokens, channels] with one mask each, got {len(masks)}, "
                f"and base={base!r} 'own' or 'uncond'"
            )
        self.texts, self.masks, self.weights, self.base = texts, masks, weights, base
        self.where, self.schedule = where or Where(kinds=("cross",)), schedule or Schedule()

    def check(self, control) -> None:
        for site in self.where.select(control.sites):
            if getattr(site.module, "to_k", None) is None or getattr(site.module, "norm_cross", None):
                raise ValueError(f"{site.path} has no plain projections of text; Contexts cannot serve it")

    def plan(self, context: Context) -> tuple | None:
        weights = self.weights(context.moment.step or 0) if callable(self.weights) else self.weights
        weights = torch.as_tensor(weights, dtype=torch.float32).expand(len(self.texts))
        if not bool(weights.any()):
            return None
        rows = [context.rows.of(None, name) for name in ("cond", "uncond")]
        if self.base == "uncond" and len(rows[0]) != len(rows[1]):
            raise ValueError("base='uncond' needs guidance with both branches in one batch; guidance is off here")
        return context, rows, weights

    def out(self, call: Call, plan: tuple, out: Tensor) -> Tensor:
        context, (rows, others), weights = plan
        grid = context.layout.grid_of(context.site)
        if context.span(call, "text", keys=True) is None or grid is None:
            return out
        channels = context.site.module.to_k.in_features
        if self.texts.shape[-1] != channels:
            raise ValueError(
                f"texts of {self.texts.shape[-1]} channels meet {context.site.path}, which reads {channels}: give them "
                "as the blocks read them, after the generator's own projection of text"
            )
        module, index = context.site.module, torch.tensor(rows, device=out.device)
        masks = regions_to_grid(self.masks, grid).to(out)
        base = out[list(rows if self.base == "own" else others)]
        mine = out[index]
        for text, mask, weight in zip(self.texts.to(out), masks, weights.to(out), strict=True):
            key, value = module.to_k(text)[None], module.to_v(text)[None]
            heads, norm = call.key.shape[2], getattr(module, "norm_k", None) or nn.Identity()
            # Wan norms all heads together
            over_all = getattr(norm, "weight", key[0, 0]).numel() == key.shape[-1]
            key = norm(key) if over_all else key
            key, value = (x.unflatten(-1, (heads, -1)) for x in (key, value))
            key = key if over_all else norm(key)
            key, value = (x.expand(len(rows), *x.shape[1:]) for x in (key, value))
            read = replace(call, query=call.query[index], key=key, value=value, mask=None).dense()
            mine = mine + weight * mask[:, None, None] * (read - base)
        return out.index_copy(0, index, mine)
