"""AgentSD: faster Stable Diffusion without training, by agent attention over merged tokens (arXiv:2312.08874, 4.4).

    apply_agent_sd(pipe, **AGENT_SD_RECIPE[0])
    image = pipe(prompt, callback_on_step_end=agent_sd_schedule(AGENT_SD_RECIPE)).images[0]
    remove_agent_sd(pipe)

Self-attention of a diffusers UNet sees tokens merged by similarity, and where agent tokens, merged further, are less
than half as many, it goes through them. All weights stay as they are.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.ops import agent_attention
from .token_merging import Matching, random_destinations

_logger = logging.getLogger(__name__)
DOWNSAMPLES = (1, 2, 4, 8)

AGENT_SD_RECIPE: dict[int, dict[str, Any]] = {
    0: dict(sx=4, sy=4, ratio=0.4, agent_ratio=0.95),
    20: dict(sx=2, sy=2, ratio=0.4, agent_ratio=0.5),
}
"""The authors' settings for 50 steps, by the step from which they hold; from step 20 on, no agents are used."""


@dataclass(frozen=True)
class AgentSDSettings:
    """See `apply_agent_sd`."""

    ratio: float = 0.5
    sx: int = 2
    sy: int = 2
    agent_ratio: float = 0.8
    k_scale2: float = 0.3
    k_shortcut: float = 0.075
    max_downsample: int = 1

    def __post_init__(self):
        for name in ("ratio", "agent_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("sx", "sy"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        if self.max_downsample not in DOWNSAMPLES:
            raise ValueError(f"max_downsample={self.max_downsample} must be one of {DOWNSAMPLES}")

    @property
    def has_agents(self) -> bool:
        """Return whether agents are used: fewer than half as many as tokens. One token per cell is never merged."""
        kept, agents = (1 - min(x, 1 - 1 / (self.sx * self.sy)) for x in (self.ratio, self.agent_ratio))
        return 2 * agents < kept


class _State:
    """State shared by the processors of a UNet: settings, and the size of the latents in the current call."""

    def __init__(self, unet: nn.Module, settings: AgentSDSettings, generator: torch.Generator | None):
        self.settings, self.generator = settings, generator
        self.size: tuple[int, int] | None = None
        self.hook = unet.register_forward_pre_hook(self._note_size, with_kwargs=True)

    def _note_size(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        sample = args[0] if args else kwargs["sample"]
        self.size = (sample.shape[-2], sample.shape[-1])

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Height and width of a layer that may be merged, or None for all others."""
        if self.size is None:
            return None
        height, width = self.size
        for factor in DOWNSAMPLES:
            shape = ceil(height / factor), ceil(width / factor)
            if factor <= self.settings.max_downsample and shape[0] * shape[1] == tokens:
                return shape
        return None


class AgentSDProcessor:
    """Attention processor of diffusers for self-attention over merged tokens and agents."""

    def __init__(self, original: Any, state: _State):
        self.original, self.state = original, state

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        settings = self.state.settings
        shape = self.state.grid(hidden_states.shape[1]) if hidden_states.dim() == 3 else None
        count = int(hidden_states.shape[1] * settings.ratio)
        few = shape is not None and (shape[0] < settings.sy or shape[1] < settings.sx)  # not one whole cell
        if shape is None or few or encoder_hidden_states is not None or attention_mask is not None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        destination = random_destinations(shape, (settings.sy, settings.sx), self.state.generator)
        matching = Matching(hidden_states, destination)
        tokens, agents = matching.merging(count), matching.merging(int(hidden_states.shape[1] * settings.agent_ratio))
        merged = tokens.merge(hidden_states) if count else hidden_states
        if 2 * len(agents) < len(tokens):
            out = agent_self_attention(
                attn, merged, agents.merge(hidden_states), k_scale2=settings.k_scale2, k_shortcut=settings.k_shortcut
            )
        else:
            out = self.original(attn, merged, None, None, temb)
        return tokens.unmerge(out) if count else out


def agent_self_attention(attn: Any, tokens: Tensor, agents: Tensor, *, k_scale2: float, k_shortcut: float) -> Tensor:
    """Self-attention of a diffusers `Attention` through agents, output projection included.

    softmax(q a^T hd^(-k_scale2 / 2)) softmax(a k^T hd^(-1/2)) v + k_shortcut v, of head dim hd.

    Args:
        attn: a `diffusers.models.attention_processor.Attention`.
        tokens: `[B, N, C]`.
        agents: `[B, A, C]`, projected as queries are.
        k_scale2: the exponent of the second softmax, as a multiple of -1/2.
        k_shortcut: weight of the value added.

    Returns:
        `[B, N, C]`.
    """

    def heads(x: Tensor) -> Tensor:  # [B, N, heads, head_dim]
        return x.unflatten(-1, (attn.heads, -1))

    query, key, value = heads(attn.to_q(tokens)), heads(attn.to_k(tokens)), heads(attn.to_v(tokens))
    agent, head_dim = heads(attn.to_q(agents)), query.shape[-1]
    out = agent_attention(query, key, value, agent, scale=head_dim**-0.5, query_scale=head_dim ** (-0.5 * k_scale2))
    out = (out + k_shortcut * value).flatten(-2)
    for module in attn.to_out:  # projection and dropout
        out = module(out)
    return (out + tokens if attn.residual_connection else out) / attn.rescale_output_factor


def _find_unet(unet_or_pipe: Any) -> nn.Module:
    unet = getattr(unet_or_pipe, "unet", unet_or_pipe)
    if not isinstance(unet, nn.Module):
        raise TypeError(f"unet_or_pipe must be a UNet or have one as .unet, got {type(unet_or_pipe).__name__}")
    return unet


def _state(unet: nn.Module) -> _State | None:
    for module in unet.modules():
        if isinstance(processor := getattr(module, "processor", None), AgentSDProcessor):
            return processor.state
    return None


def apply_agent_sd(
    unet_or_pipe: Any,
    *,
    ratio: float = 0.5,
    sx: int = 2,
    sy: int = 2,
    agent_ratio: float = 0.8,
    k_scale2: float = 0.3,
    k_shortcut: float = 0.075,
    max_downsample: int = 1,
    generator: torch.Generator | None = None,
) -> None:
    """Make the self-attentions of a UNet merge tokens and go through agents; settings given before are replaced.

    Args:
        unet_or_pipe: a diffusers UNet with transformer blocks, or a pipeline that has one as `.unet`.
        ratio: share of the tokens that are merged away before attention, 0 to 1; 0 merges none.
        sx, sy: width and height of the cells of the grid in which one token each is never merged away.
        agent_ratio: share of the tokens that are merged away to make agents, 0 to 1. Agents are used where they are
            less than half as many as the tokens that `ratio` leaves.
        k_scale2: queries see agents with the scale head_dim ** (-k_scale2 / 2).
        k_shortcut: weight of the value added to the output.
        max_downsample: the deepest layers changed: 1, 2, 4 or 8 times smaller than the latents.
        generator: of the random token of every cell; torch's global one on the CPU when None.

    Raises:
        TypeError: neither a UNet nor a pipeline with one.
        ValueError: a setting out of its range, or a UNet in which nothing can be changed.
        NotImplementedError: attention that normalises queries and keys.
    """
    from diffusers.models.attention import BasicTransformerBlock

    settings = AgentSDSettings(ratio, sx, sy, agent_ratio, k_scale2, k_shortcut, max_downsample)
    unet = _find_unet(unet_or_pipe)
    blocks = [m for m in unet.modules() if isinstance(m, BasicTransformerBlock) and not m.only_cross_attention]
    if not blocks:
        raise ValueError(f"{type(unet).__name__} has no BasicTransformerBlock with self-attention")
    if any(block.attn1.norm_q is not None for block in blocks):
        raise NotImplementedError(f"{type(unet).__name__} normalises queries and keys")
    if not settings.has_agents:
        _logger.warning("ratio=%s and agent_ratio=%s leave too many agents: tokens are only merged", ratio, agent_ratio)
    remove_agent_sd(unet)
    state = _State(unet, settings, generator)
    for block in blocks:
        block.attn1.set_processor(AgentSDProcessor(block.attn1.processor, state))


def remove_agent_sd(unet_or_pipe: Any) -> None:
    """Give every attention the processor it had before `apply_agent_sd`; without it, nothing happens."""
    unet = _find_unet(unet_or_pipe)
    if (state := _state(unet)) is None:
        return
    for module in unet.modules():
        if isinstance(processor := getattr(module, "processor", None), AgentSDProcessor):
            module.set_processor(processor.original)
    state.hook.remove()


def switch_agent_sd(unet_or_pipe: Any, **changes: Any) -> None:
    """Change settings of `apply_agent_sd`, which must have been called; those not named stay.

    Raises:
        ValueError: a setting out of its range, or a UNet without AgentSD.
        TypeError: an unknown setting.
    """
    if (state := _state(_find_unet(unet_or_pipe))) is None:
        raise ValueError("unet_or_pipe has no AgentSD; call apply_agent_sd first")
    state.settings = replace(state.settings, **changes)


def agent_sd_schedule(phases: Mapping[int, Mapping[str, Any]]) -> Callable[[Any, int, Any, dict], dict]:
    """A `callback_on_step_end` for diffusers' pipelines that switches settings by step.

    Args:
        phases: changes of settings by the step from which they hold, e.g. `AGENT_SD_RECIPE`. Those of step 0 are set
            again after the last step, for the next image; for the first image give them to `apply_agent_sd`.

    Raises:
        ValueError: no settings for step 0.
    """
    if 0 not in phases:
        raise ValueError(f"phases={dict(phases)} must have settings for step 0")

    def callback(pipe: Any, step: int, timestep: Any, callback_kwargs: dict) -> dict:
        following = 0 if step + 1 == pipe.num_timesteps else step + 1
        if following in phases:
            switch_agent_sd(pipe, **phases[following])
        return callback_kwargs

    return callback
