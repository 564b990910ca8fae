"""Cost of a plan in a generator and its saving, from shapes alone, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...kernels.masks.named import density as density_of_lists
from ...kernels.masks.named import resolve
from ...kernels.neighborhood.cost import visible_pairs
from ...kernels.neighborhood.heads import head_groups
from ..sites import Layout, Site
from ..sites.layout import complete
from ..sites.models import models_of, row
from .acceleration import Acceleration, accelerations
from .plan import Plan
from .presets import as_plan
from .sparse import Choice

TEMPORAL = (
    "vae_scale_factor_temporal",
    "vae_temporal_compression_ratio",
    "vae_temporal_scale_factor",
    "temporal_compression_ratio",
)
SPATIAL = (
    "vae_scale_factor_spatial",
    "vae_spatial_compression_ratio",
    "vae_spatial_scale_factor",
    "vae_scale_factor",
    "spatial_compression_ratio",
)
# Linear layers by the tokens that pass them; what is not named here is passed by the tokens of the grid
ONE_TOKEN = re.compile(
    r"time|(?:^|\.)[tp]_embedder|guidance|pooled|modulation|adaln|norm\d?(?:_context)?\.linear|emb_proj|add_embedding"
    r"|_mod\.",
    re.IGNORECASE,
)
TEXT_TOKENS = re.compile(
    r"add_[qkv]_proj|add_out|context|caption|cap_embedder|txt|text|_t\b|attn2\.to_[kv]\b|attn2\.add_|encoder"
)
ALL_TOKENS = re.compile(r"^single|^layers\.")


@dataclass(frozen=True)
class SiteCost:
    """One attention in one step of one batch entry.

    Attributes:
        site: the attention.
        words: visible keys of its queries, in a few words.
        reason: why it is dense, empty where it is sparse.
        density: share of the pairs of the grid's tokens that are kept; None if only the data tell.
        dense_flops, flops: of its two products, dense and by the plan.
    """

    site: Site
    words: str
    reason: str
    density: float | None
    dense_flops: int
    flops: int


@dataclass(frozen=True)
class PlanCost:
    """Result of `explain`. Shares and bounds are of FLOPs; kernels that differ in speed change what is measured.

    Attributes:
        model: class of the generator.
        plan: the plan, None without one.
        grid: tokens along the axes of the grid.
        text: text tokens.
        steps, sparse_steps: steps of the run, and those with sparse attention.
        sites: cost of each attention.
        other_flops: of all linear layers and convolutions in one step of one batch entry, about.
    """

    model: str
    plan: Plan | None
    grid: tuple[int, ...]
    text: int
    steps: int
    sparse_steps: int
    sites: tuple[SiteCost, ...]
    other_flops: int

    @property
    def attention_share(self) -> float:
        """Share of self-attention, joint attention included, in the FLOPs of a dense step."""
        mine = sum(cost.dense_flops for cost in self.sites if cost.site.kind in ("self", "joint"))
        return mine / max(self.dense_step_flops, 1)

    @property
    def dense_step_flops(self) -> int:
        return self.other_flops + sum(cost.dense_flops for cost in self.sites)

    @property
    def sparse_step_flops(self) -> int:
        return self.other_flops + sum(cost.flops for cost in self.sites)

    @property
    def bound(self) -> float:
        """Speed-up if self-attention cost nothing, in every step: Amdahl's law."""
        return 1 / max(1 - self.attention_share, 1e-9)

    @property
    def speedup(self) -> float:
        """Ratio of the FLOPs of the run, dense to plan."""
        dense = self.steps * self.dense_step_flops
        mixed = self.sparse_steps * self.sparse_step_flops + (self.steps - self.sparse_steps) * self.dense_step_flops
        return dense / max(mixed, 1)

    def __str__(self) -> str:
        tokens, grid = prod(self.grid), "x".join(map(str, self.grid))
        heads = sorted({(cost.site.heads, cost.site.head_dim) for cost in self.sites if cost.site.kind != "refine"})
        layers = len({cost.site.layer for cost in self.sites if cost.site.kind != "refine"})
        lines = [
            f"{self.model}  grid {grid} = {tokens:,} tokens + {self.text} text  {layers} layers  "
            + ", ".join(f"{n} heads of {d}" for n, d in heads),
            f"a dense step: {_flops(self.dense_step_flops)} a batch entry, self-attention "
            f"{self.attention_share:.0%} of it: at most {self.bound:.2f}x faster",
        ]
        if self.plan is not None:
            lines.append(
                f"plan {self.plan.name}: {self.sparse_steps} of {self.steps} steps sparse, a sparse step "
                f"{_flops(self.sparse_step_flops)}: {self.speedup:.2f}x fewer FLOPs over the run"
            )
        lines.append(f"{'sites':>5}  {'layers':<10} {'kind':<6} {'density':>7}  attention")
        groups: dict[tuple, list[SiteCost]] = {}
        for cost in self.sites:
            text = cost.words if not cost.reason else f"dense: {cost.reason}"
            share = "?" if cost.density is None else f"{cost.density:.3f}"
            groups.setdefault((cost.site.kind, share, text), []).append(cost)
        for (kind, share, text), costs in groups.items():
            numbers = sorted({cost.site.layer for cost in costs})
            span = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
            lines.append(f"{len(costs):>5}  {span:<10} {kind:<6} {share:>7}  {text}")
        return "\n".join(lines)


def _flops(count: float) -> str:
    for scale, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} FLOP"


def explain(
    pipe_or_model: Any,
    plan: Plan | Mapping[str, Any] | str | Path | None = None,
    *,
    height: int,
    width: int,
    frames: int = 1,
    steps: int = 50,
    text: int | None = None,
    **changes: Any,
) -> PlanCost:
    """Say what a generator's attention costs at a size, and what a plan makes of it. Nothing is computed.

    Args:
        pipe_or_model: a pipeline, transformer or UNet of diffusers, or a `VideoDiT`. Strides of the VAE are the
            pipeline's; without one, those that the model is published with.
        plan: as `accelerate` takes it; the plan at work when None, and dense attention without one.
        height, width, frames: of the video or image, in pixels and frames.
        steps: of the run.
        text: text tokens; the usual number of the model when None.
        changes: as `accelerate` takes them.

    Returns:
        A `PlanCost`; print it.

    Raises:
        ValueError, TypeError: as `accelerate`; sizes of less than one token.
    """
    models = models_of(pipe_or_model)
    component, model = next(iter(models.items()))
    known = row(model)
    assert known is not None
    layout = _layout(pipe_or_model if component else None, model, height=height, width=width, frames=frames)
    at_work = accelerations(pipe_or_model)
    if plan is None:
        acceleration = at_work[0] if at_work else None
    else:
        acceleration = Acceleration(pipe_or_model, as_plan(plan, **changes))
    text = known.text if text is None else text
    sites = acceleration.every if acceleration is not None else Acceleration(pipe_or_model, Plan(window=1)).every
    costs = tuple(_site_cost(site, layout, acceleration, text) for site in sites if site.component == component)
    sparse = steps
    if acceleration is not None:
        sparse = sum(acceleration.plan.is_sparse(step, steps, None) for step in range(steps))
    return PlanCost(
        type(model).__name__,
        None if acceleration is None else acceleration.plan,
        layout.grid or (0,),
        text,
        steps,
        sparse if acceleration is not None else 0,
        costs,
        _other_flops(model, layout, text),
    )


def _layout(pipe: Any, model: nn.Module, *, height: int, width: int, frames: int) -> Layout:
    """Layout of a size in pixels and frames.

    Raises:
        ValueError: no token along an axis.
    """
    known = row(model)
    assert known is not None
    temporal = _first(pipe, TEMPORAL, known.stride[0])
    spatial = _first(pipe, SPATIAL, known.stride[1]) * known.pack
    latents = ((frames - 1) // temporal + 1, height // spatial, width // spatial)
    arguments = known.example(*latents)
    layout = complete(known.layout(model, arguments), {}, ())
    if layout.grid is None or min(layout.grid) < 1:
        raise ValueError(
            f"height={height}, width={width}, frames={frames} make {latents} latents and the grid {layout.grid}; "
            "expected at least one token along each axis"
        )
    return layout


def _first(pipe: Any, names: tuple[str, ...], default: int) -> int:
    """The first of these attributes of a pipeline or its VAE that is there."""
    found = (getattr(owner, name, None) for owner in (pipe, getattr(pipe, "vae", None)) for name in names)
    return next((int(x) for x in found if isinstance(x, int) and x), default)


def _site_cost(site: Site, layout: Layout, acceleration: Acceleration | None, text: int) -> SiteCost:
    per_pair = 4 * site.heads * site.head_dim
    grid = layout.grid_of(site)
    assert grid is not None and layout.grid is not None
    tokens = prod(grid)
    sequences = prod(layout.levels[site.level] if layout.levels else layout.grid) // tokens
    lengths = {
        "video": tokens,
        "image": tokens,
        "text": text,
        "condition": 257,
        "audio": 0,
        "reference": 0,
        "padding": 0,
    }
    lengths |= {name: n for name, n in layout.counts.items() if name not in ("video", "image")}
    dense = 0
    for operation in site.operations:
        queries, keys = (sum(lengths[name] for name in names) for names in (operation.queries, operation.keys))
        dense += queries * keys * sequences
    if site.kind not in ("self", "joint") or site.operations[0].main is None:
        return SiteCost(site, "", f"{site.kind}-attention", 1.0, dense * per_pair, dense * per_pair)
    choice = "no plan" if acceleration is None else acceleration.choice(site, layout)
    if isinstance(choice, str):
        return SiteCost(site, "", choice, 1.0, dense * per_pair, dense * per_pair)
    plan = acceleration.plan.of_layer(site.layer)  # type: ignore[union-attr]
    assert plan is not None
    share = kept_share(choice, site, plan)
    kept = round(dense - (1 - (1.0 if share is None else share)) * tokens**2 * sequences)
    return SiteCost(site, plan.words, "", share, dense * per_pair, kept * per_pair)


def kept_share(choice: Choice, site: Site, plan: Plan) -> float | None:
    """Share of the pairs of the grid's tokens that a choice keeps, mean of the heads; None if only the data tell."""
    tokens = prod(choice.grid)
    if choice.window is not None:
        groups = head_groups(choice.grid, site.heads, site.heads, causal=False, **choice.window)
        counts = (len(range(*g.heads.indices(site.heads))) * visible_pairs(g.axes) for g in groups)
        return sum(counts) / site.heads / tokens**2
    if choice.lists is not None:
        return density_of_lists(choice.lists, choice.grid)
    return plan.budget if plan.budget is not None else _listed_share(choice, site, plan)


def _listed_share(choice: Choice, site: Site, plan: Plan) -> float | None:
    """Share of the keys in lists as long as they can get, if shapes tell it."""
    assert plan.mask is not None
    if choice.tokens is not None:  # lists of tokens at several resolutions
        return None
    mask, _ = resolve(plan.mask, plan.options, plan.budget)
    grid = (prod(choice.grid),) if choice.flat else choice.grid
    nothing = torch.empty(1, *grid, site.heads, site.head_dim, device="meta")
    try:
        lists = mask(nothing, nothing, grid)
    except (RuntimeError, NotImplementedError):
        return None
    keys = lists.kv_idx.shape[-1] * prod(lists.key_block)
    return min(keys / prod(grid), 1.0)


def _other_flops(model: nn.Module, layout: Layout, text: int) -> int:
    """FLOPs of linear layers and convolutions, by the tokens that pass each; experts count as if all were used."""
    assert layout.grid is not None
    total, tokens = 0, prod(layout.grid)
    shared = type(model).__name__.startswith("CogVideoX")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and layout.levels:
            total += 2 * module.weight.numel() * prod(_map_of(name, layout, module.stride[0]))
        if not isinstance(module, nn.Linear) or ONE_TOKEN.search(name) or "audio" in name:
            continue
        if layout.levels:
            frames = prod(layout.levels[0][:-2])
            reads_text = TEXT_TOKENS.search(name) and "motion_modules" not in name
            count = frames * text if reads_text else prod(_map_of(name, layout, 1))
        elif shared or ALL_TOKENS.search(name):
            count = tokens + text
        else:
            count = text if TEXT_TOKENS.search(name) else tokens
        total += 2 * module.weight.numel() * count
    return total


def _map_of(name: str, layout: Layout, stride: int) -> tuple[int, ...]:
    """Frames, height and width of the output of a layer of a UNet; an image has no frames."""
    place, _, rest = name.partition(".")
    last = len(layout.levels) - 1
    if place == "mid_block":
        level = last
    elif place in ("down_blocks", "up_blocks"):
        number = int(rest.split(".")[0])
        level = number if place == "down_blocks" else last - number
    else:
        level = 0
    level += (stride > 1) - ("upsamplers" in name)
    return layout.levels[min(max(level, 0), last)]
