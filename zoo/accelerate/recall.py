"""Recall of attention mass: the share of the dense softmax that a plan keeps, seen in a run that stays dense."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ...kernels.ops import block_sparse_attention
from ..sites import Call, Interception, Layout, Moment, Schedule, Site
from ..sites.intercept import Following
from .acceleration import Acceleration
from .explain import kept_share
from .plan import Plan
from .sparse import WINDOWS, Choice, block_lists, on_grid, split


class Recall:
    """Observes a generator whose attention stays dense; a context manager.

    Attributes:
        mean, worst: by the path of the site, recall over batch, steps and all heads, or of the worst head.
        densities: by the path of the site, share of the pairs that the plan keeps, None if only the data tell.
        dense: by the path of the site, why the plan leaves it dense.
    """

    def __init__(self, pipe_or_model: Any, plan: Plan, *, steps: Collection[int] | None = None):
        self.steps = steps
        self.acceleration = Acceleration(pipe_or_model, plan)
        self.dense: dict[str, str] = {}
        self.densities: dict[str, float | None] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self.interception = Interception(
            pipe_or_model,
            self.observe,
            sites=self.acceleration.sites,
            schedule=Schedule(steps=(None, None)),
            plan=self.choose,
        )

    def choose(self, site: Site, layout: Layout, moment: Moment) -> Choice | None:
        if self.steps is not None and moment.step not in self.steps:
            return None
        found = self.acceleration.choice(site, layout)
        if isinstance(found, str):
            self.dense[site.path] = found
            return None
        if site.path not in self.densities:
            plan = self.acceleration.plan.of_layer(site.layer)
            assert plan is not None
            self.densities[site.path] = kept_share(found, site, plan)
        return found

    @torch.no_grad()
    def observe(self, call: Call, following: Following) -> Tensor:
        kept = mass_kept(call)
        if kept is not None:
            path = call.site.path
            self._sums[path] = self._sums.get(path, 0) + kept.double().cpu()
            self._counts[path] = self._counts.get(path, 0) + 1
        return following(call)

    @property
    def mean(self) -> dict[str, float]:
        return {path: (x / self._counts[path]).mean().item() for path, x in self._sums.items()}

    @property
    def worst(self) -> dict[str, float]:
        return {path: (x / self._counts[path]).min().item() for path, x in self._sums.items()}

    def __enter__(self) -> Recall:
        self.interception.install()
        return self

    def __exit__(self, *error: object) -> None:
        self.interception.remove()


def mass_kept(call: Call) -> Tensor | None:
    """Share of the dense attention mass that `call.plan`, a `Choice`, keeps, mean of batch and queries: `[heads]`.

    It is exp(lse of the keys that are kept - lse of all keys), so nothing has the size of tokens times tokens. None
    where the operation is not one over the tokens of the grid.
    """
    choice: Choice = call.plan
    parts = split(call, choice)
    if parts is None:
        return None
    additional = dict(zip(("additional_keys", "additional_values", "additional_mask"), parts[1:], strict=True))
    query, key, value = (x.unflatten(1, choice.grid) for x in on_grid(call, choice))
    rank = len(choice.grid)
    options = {"scale": call.scale, "return_lse": True, **additional}
    attend = WINDOWS[rank]
    everything = attend(query, key, value, window=choice.grid, **options)[1].flatten(1, rank)
    if choice.window is not None:
        kept = attend(query, key, value, **choice.window, **options)[1]
    else:
        mask = block_lists(choice, query, key)
        if len(mask.query_block) != rank:
            query, key, value = (x.flatten(1, rank) for x in (query, key, value))
        if choice.tokens is not None:  # a mean of keys stands for no more than their mass
            key, value = choice.tokens(key), choice.tokens(value)
        kept = block_sparse_attention(query, key, value, mask=mask, **options)[1]
    return (kept.flatten(1, -2) - everything).float().exp().mean(dim=(0, 1))
