"""Prompt-to-Prompt by `Control` against maps that are made, on a small UNet of SDXL's shape.

Whole evaluations of two prompts: the maps of every attention are made, edited and multiplied (`explicit maps`, as the
authors do); the edits move onto the values (`control`); the edits are installed and have nothing to do (`neutral`);
nothing is installed (`plain`). Self-attention is injected up to half of the largest grid, as by the authors.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from foveal.zoo.control import Control, Schedule, Where, edits
from matplotlib.figure import Figure
from torch import Tensor

from ..benchmark import Benchmark, Maker, Metric, refuse_wrong
from ..figures import in_order, select
from ..records import Row

TOKENS, CHANNELS = 77, 64  # of a prompt
PROVIDERS = ("control", "explicit maps", "neutral", "plain")
LIMITS = {"memory": 0.35, "time": 0.6, "overhead": 1.03}  # that are to be reached at 64 x 64 tokens


@dataclass(frozen=True)
class Case:
    latents: int
    dtype: torch.dtype = torch.float32
    kernel = "control"
    source = "arXiv:2208.01626"

    @property
    def name(self) -> str:
        return f"prompt-to-prompt {self.latents // 2}x{self.latents // 2} tokens"


def unet() -> UNet2DConditionModel:
    """SDXL's blocks, narrow: no attention at full size, one and two transformer blocks below, pooled text and sizes."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"transformer_layers_per_block": (1, 1, 2), "attention_head_dim": (2, 4, 8)}
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=CHANNELS,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 16,
        **options,
    ).eval()


def inputs(case: Case, device: torch.device) -> dict[str, Any]:
    """One noise for both prompts, and their texts."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, case.latents, case.latents, generator=generator).expand(2, -1, -1, -1)
    text = torch.randn(2, TOKENS, CHANNELS, generator=generator)
    added = {"text_embeds": torch.randn(2, 16, generator=generator), "time_ids": torch.full((2, 6), 1024.0)}
    given = {"sample": noise, "encoder_hidden_states": text, "added_cond_kwargs": added}
    return {
        name: {key: y.to(device) for key, y in x.items()} if isinstance(x, dict) else x.to(device)
        for name, x in given.items()
    } | {"timestep": 500}


def factors() -> tuple[Tensor, Tensor]:
    """Two words of the source for one of the target; a few words of the target are its own."""
    right = torch.eye(TOKENS)
    right[3:5, 3] = 0.5
    keep = torch.zeros(TOKENS)
    keep[10:14] = 1
    return right * (1 - keep), keep


def edits_of(neutral: bool = False) -> list:
    """Words swapped, a word weighed, small self-attention injected."""
    right, keep = factors()
    where = Where(kinds=("self",), scales=(4,))
    if neutral:
        share = edits.Share("qk", where=where, schedule=Schedule(steps=(8, 9)))
        return [edits.Transfer(lambda step: None, lambda step: keep), edits.Reweight({"word": 1.0}), share]
    share = edits.Share("qk", where=where)
    return [
        edits.Transfer(lambda step: right, lambda step: keep),
        edits.Reweight({"word": 2.0}, branch="target"),
        share,
    ]


class MapsProcessor:
    """Makes, edits and multiplies the maps of every attention."""

    def __init__(self, scale: int):
        self.scale = scale
        self.right, self.keep = factors()
        self.weight = torch.ones(TOKENS)
        self.weight[3] = 2

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(f(x)) for f, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
        )
        maps = attn.get_attention_scores(query, key).unflatten(0, (2, -1))  # [prompts, heads, N, M]
        if encoder_hidden_states is not None:
            right, keep, weight = (x.to(maps) for x in (self.right, self.keep, self.weight))
            maps[1] = (maps[0] @ right + maps[1] * keep) * weight
        elif self.scale == 4:
            maps[1] = maps[0]
        out = attn.batch_to_head_dim(torch.bmm(maps.flatten(0, 1), value))
        return attn.to_out[1](attn.to_out[0](out))


def with_maps(model: UNet2DConditionModel) -> UNet2DConditionModel:
    """The model with processors that make maps."""

    def scale(name: str) -> int:
        place, number = name.split(".")[:2]
        return 4 if place == "mid_block" or (place, number) in (("down_blocks", "2"), ("up_blocks", "0")) else 2

    processors: dict[str, Any] = {name: MapsProcessor(scale(name)) for name in model.attn_processors}
    model.set_attn_processor(processors)
    return model


class Controls(Benchmark):
    name = "control"
    suite = "control"
    title = "Prompt-to-Prompt on a UNet of SDXL's shape"
    our_names = ("control", "neutral")
    rivals = (("control", "explicit maps"), ("neutral", "plain"))
    modes = ("forward",)

    def cases(self, device: torch.device, *, everything: bool = False) -> Iterator[Case]:
        for latents in (64, 128) if everything else (128,):
            yield Case(latents)

    def verify(self, case: Case, device: torch.device) -> None:
        """On latents of 32 x 32: the edited rows equal those of edited maps."""
        small = Case(32)
        found, expected = (self.evaluation(name, small, device)() for name in ("control", "explicit maps"))
        error = float((found - expected).abs().max() / expected.abs().max())
        refuse_wrong(case.name, {"out": (error, 1e-4)})

    def evaluation(self, provider: str, case: Case, device: torch.device) -> Callable[[], Tensor]:
        """An evaluation of the model by a provider."""
        model, given = unet(), inputs(case, device)
        model.to(device)  # pyright: ignore[reportArgumentType]
        if provider == "explicit maps":
            with_maps(model)
        elif provider != "plain":
            branches = {"branches": ("source", "target"), "words": {"word": [3]}, "total_steps": 10}
            Control(model, edits_of(provider == "neutral"), **branches).install()

        @torch.no_grad()
        def call() -> Tensor:
            return model(**given).sample

        return call

    def makers(self, case: Case, mode: str, device: torch.device, *, everything: bool = False) -> dict[str, Maker]:
        return {name: partial(self.evaluation, name, case, device) for name in PROVIDERS}

    def derive(self, case: Case, mode: str, measured: Sequence[Metric], device: torch.device) -> Iterator[Metric]:
        """Ratios: control over explicit maps, neutral over plain."""
        found: dict[tuple[str, str], float] = {(m.provider, m.metric): m.p50 for m in measured}
        for metric in ("time", "memory"):
            for ours, other in self.rivals:
                mine, theirs = (found.get((name, metric)) for name in (ours, other))
                if mine and theirs:
                    yield Metric(ours, f"{metric} over {other}", "ratio", mine / theirs)

    def plot(self, rows: Sequence[Row], path: Path) -> None:
        """Bars of time and memory over explicit maps."""
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        for axes, metric in zip(figure.subplots(1, 2), ("time", "memory"), strict=True):
            found = select(rows, metric, "forward")
            cases = in_order(case for case, _ in found)
            for i, name in enumerate(PROVIDERS):
                pairs = [(found.get((case, name)), found.get((case, "explicit maps"))) for case in cases]
                ratios = [a.p50 / b.p50 if a and b else 0.0 for a, b in pairs]
                bars = axes.bar([x + 0.2 * (i - 1.5) for x in range(len(cases))], ratios, 0.19, label=name)
                axes.bar_label(bars, fmt="%.2f", fontsize=7)
            axes.set_xticks(range(len(cases)), cases)
            axes.set(ylabel=f"{metric} over explicit maps")
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].legend(fontsize=8, frameon=False)
        figure.suptitle(f"{self.title}\n{rows[0].device}", fontsize=10)
        figure.savefig(path, dpi=150)
