"""`accelerate` puts a plan into the attentions of a generator, `decelerate` takes it out."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from ...kernels.masks.named import density, listed_tokens, resolve, static_mask
from ..sites import Interception, Layout, Moment, Schedule, Site, find
from ..sites.intercept import Call, Following, InterceptedProcessor
from ..sites.models import models_of
from ..sites.site import resolve_layers
from .gates import find_gate
from .plan import Plan, fit_window, is_per_head
from .presets import as_plan
from .sparse import Choice, attend


class Acceleration:
    """A plan at work; a context manager. Print it for what each layer does.

    Attributes:
        plan: see `Plan`.
        sites: attentions over the tokens of a grid; all others stay as they are.
        sparse: of the last forward, by the path of the site, what its queries see.
        dense: of the last forward, by the path of the site, why it was dense.
    """

    def __init__(self, pipe_or_model: Any, plan: Plan, total_steps: int | None = None):
        self.plan = plan
        self.every = find(pipe_or_model)
        self.sites = [s for s in self.every if s.operations[0].main and s.kind in ("self", "joint")]
        self.dense_layers = resolve_layers(self.every, plan.dense_layers)
        resolve_layers(self.every, plan.layers)
        self.sparse: dict[str, str] = {}
        self.dense: dict[str, str] = {}
        self._choices: dict[tuple, Choice | str] = {}
        for site in self.sites:
            self._check(site)
        schedule = Schedule(steps=(None, None) if plan.needs_time else None)
        self.interception = Interception(
            pipe_or_model,
            self.attend,
            sites=self.sites,
            schedule=schedule,
            plan=self.choose,
            owner=True,
            total_steps=total_steps,
        )

    def _check(self, site: Site) -> None:
        """Raises ValueError where a plan asks for what a site has not."""
        plan = self.plan.of_layer(site.layer)
        if plan is None or site.layer in self.dense_layers:
            return
        for name in ("window", "stride", "dilation"):
            sizes = getattr(plan, name)
            if is_per_head(sizes) and len(sizes) != site.heads:
                raise ValueError(f"{name} has entries for {len(sizes)} heads; {site.path} has {site.heads}")
        if plan.mask is not None:
            resolve(plan.mask, plan.options, plan.budget)
        if plan.gated:
            find_gate(site)

    def attend(self, call: Call, following: Following) -> Tensor:
        return attend(call, following)

    def choose(self, site: Site, layout: Layout, moment: Moment) -> Choice | None:
        """Choose sparse attention for a site in a forward, or None for dense, whose reason is noted."""
        found = self.choice(site, layout)
        if isinstance(found, Choice) and not self.plan.is_sparse(moment.step, moment.total, moment.noise):
            found = f"dense_steps={self.plan.dense_steps}, noise={self.plan.noise}: step {moment.step}"
        if isinstance(found, str):
            self.dense[site.path] = found
            self.sparse.pop(site.path, None)
            return None
        plan = self.plan.of_layer(site.layer)
        assert plan is not None
        self.sparse[site.path] = plan.words
        self.dense.pop(site.path, None)
        return found

    def choice(self, site: Site, layout: Layout) -> Choice | str:
        """Return the sparse attention of a site for a layout, in steps that are not dense, or the reason for dense."""
        key = (site.path, layout.grid, tuple(sorted(layout.counts.items())), layout.why, layout.masked, layout.device)
        if key not in self._choices:
            if len(self._choices) > 16 * len(self.sites):  # many sizes in one process
                self._choices.clear()
            self._choices[key] = self._new_choice(site, layout)
        return self._choices[key]

    def _new_choice(self, site: Site, layout: Layout) -> Choice | str:
        plan, grid = self.plan.of_layer(site.layer), layout.grid_of(site)
        if site.layer in self.dense_layers:
            return f"dense_layers={tuple(self.plan.dense_layers)}"
        if plan is None:
            return f'layers[{site.layer}] is "dense"'
        if site.pattern != "dense":
            return f"the model itself attends by a pattern: {site.pattern}"
        if grid is None:
            return layout.why
        if layout.masked:
            return f"the model was given {layout.masked}"
        if prod(grid) < plan.min_tokens:
            return f"{prod(grid):,} tokens < min_tokens={plan.min_tokens:,}"
        if plan.budget == 1 and plan.skip_threshold is None:
            return "budget=1"
        if plan.mask is None:
            window = fit_window(plan, grid, site.axes)
            return "the window covers the grid" if window is None else Choice(layout, grid, window)
        mask, static = resolve(plan.mask, plan.options, plan.budget)
        gate = (find_gate(site), plan.options.get("block", 4)) if plan.gated else None
        lists = None
        if static:
            lists = static_mask(mask, (prod(grid),) if plan.flat else grid, site.heads, layout.device)
            if gate is None and plan.skip_threshold is None and density(lists, grid) == 1:
                return "the mask covers the grid"
        tokens = listed_tokens(plan.mask, plan.options)
        return Choice(layout, grid, None, mask, lists, plan.flat, gate, plan.skip_threshold, tokens)

    def install(self) -> Acceleration:
        self.interception.install()
        return self

    def undo(self) -> None:
        """Take the plan out: processors and hooks are the objects that they were."""
        self.interception.remove()

    def __enter__(self) -> Acceleration:
        return self if self.interception.installed else self.install()

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __str__(self) -> str:
        names = ", ".join(type(model).__name__ for model in self.interception.models.values())
        first, last = self.plan.dense_first_and_last
        lines = [
            f"{names}: plan {self.plan.name}, {self.plan.words if self.plan.of_layer(-1) else 'by layer'}",
            f"dense: first steps {first}, last steps {last}, layers {sorted(self.dense_layers)}; "
            "text and conditions are visible to all tokens; "
            f"{len(self.every) - len(self.sites)} other attentions are untouched",
        ]
        if not (self.sparse or self.dense):
            return "\n".join([*lines, "nothing has run yet"])
        lines += [f"sparse: {_ranges(paths)}  {words}" for words, paths in _group(self.sparse).items()]
        lines += [f"dense:  {_ranges(paths)}  {reason}" for reason, paths in _group(self.dense).items()]
        return "\n".join(lines)


def _group(by_path: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path, text in by_path.items():
        groups.setdefault(text, []).append(path)
    return groups


def _ranges(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]} ({len(paths)})"


def accelerate(
    pipe_or_model: Any,
    plan: Plan | Mapping[str, Any] | str | Path,
    *,
    total_steps: int | None = None,
    **changes: Any,
) -> Acceleration:
    """Make the self-attention of a generator sparse, from now on until `decelerate`.

    Everything else stays usable: LoRA, offload, caches, attention backends (they compute what stays dense),
    `compile_repeated_blocks`, gradients, any size. Text and images that condition are seen by all tokens and see all of
    them. A plan that keeps everything is the model itself, bit for bit.

    Args:
        pipe_or_model: a pipeline of diffusers (both transformers of Wan 2.2), a transformer, a UNet, a `VideoDiT`; a
            plan that it has already is replaced.
        plan: a `Plan`, a mapping with its fields, a name in `PRESETS` or `foveal.kernels.masks`, or a file.
        total_steps: steps of a run, for shares in dense_steps where there is no pipeline.
        changes: fields of `Plan` that replace those of the plan, such as dense_steps=0.2 or min_tokens=8192.

    Returns:
        An `Acceleration`: print it, `undo()` it, or use it as a context manager.

    Raises:
        ValueError, TypeError: a plan that is not one, or a generator whose attention cannot be intercepted; the message
            names argument or site. Nothing is changed then.
    """
    made = Acceleration(pipe_or_model, as_plan(plan, **changes), total_steps)
    before = accelerations(pipe_or_model)
    for one in before:
        one.undo()
    try:
        return made.install()
    except Exception:
        for one in before:
            one.install()
        raise


def decelerate(pipe_or_model: Any) -> None:
    """Take plans out of a generator; without one, nothing happens.

    Raises:
        TypeError, ValueError: not a generator with known attentions.
    """
    for one in accelerations(pipe_or_model):
        one.undo()


def accelerations(pipe_or_model: Any) -> list[Acceleration]:
    """The plans at work in a generator."""
    found: list[Acceleration] = []
    for model in models_of(pipe_or_model).values():
        for module in model.modules():
            processor = getattr(module, "processor", None)
            if isinstance(processor, InterceptedProcessor):
                owners = (getattr(link.attend, "__self__", None) for link in processor.links)
                found += [x for x in owners if isinstance(x, Acceleration) and x not in found]
    return found
