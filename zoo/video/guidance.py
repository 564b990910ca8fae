"""Guidance by chosen attention heads: SoftPAG, and the search for heads that serve an aim.

Ahn et al., "Fine-Grained Perturbation Guidance via Attention Head Selection" (arXiv:2506.10978), after perturbed
attention guidance (arXiv:2403.17377).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sites.intercept import InterceptedProcessor
from .attention import VideoAttention, VideoAttnProcessor
from .pattern import Text

Heads = Mapping[int, Sequence[int]]  # layer -> its heads


@dataclass(frozen=True)
class Perturbation:
    """Guidance away from perturbed heads.

    Attributes:
        scale: of the difference to the perturbed prediction; 0 is off.
        heads: layer → heads to perturb.
        strength: of the perturbation, in 0..1.
    """

    scale: float = 0.0
    heads: Heads | None = None
    strength: float = 1.0

    def check(self, transformer: Any) -> None:
        """Raises ValueError, naming the pipeline's argument, unless the model has the heads."""
        if self.scale and not self.heads:
            raise ValueError(f"pag_scale={self.scale} needs pag_heads, layer -> heads")
        check_heads(transformer, self.heads or {}, self.strength)


class SoftPAGProcessor(VideoAttnProcessor):
    """Self-attention whose maps `A` become `(1 - u) A + u I`, head by head.

    The output of a head is then `(1 - u) out + u value`, so no map is ever made. u = 0 is the plain processor, u = 1
    perturbed attention guidance. Text tokens that attend along keep their own maps.

    Args:
        strength: u for each head of the layer.
        inner: the processor that attends; the plain one when None.
    """

    def __init__(self, strength: Sequence[float], inner: VideoAttnProcessor | None = None):
        super().__init__()
        self.strength, self.inner = tuple(strength), inner or VideoAttnProcessor()

    def see(self, attn: VideoAttention, query: Tensor, key: Tensor, value: Tensor, text: Text | None) -> Tensor:
        out = self.inner.see(attn, query, key, value, text)  # [B, T, H, W, heads, d]
        strength = out.new_tensor(self.strength)[:, None]
        return torch.lerp(out, value[:, -out.shape[1] :], strength)

    def read(self, attn: VideoAttention, query: Tensor, text: Text, key: Tensor, value: Tensor) -> Tensor:
        return self.inner.read(attn, query, text, key, value)


@contextmanager
def processors(transformer: Any, wrap: Callable[[str, VideoAttnProcessor], VideoAttnProcessor]) -> Iterator[None]:
    """Inside, every attention processor is what `wrap(name, processor)` makes of it; they are taken back after.

    Raises:
        TypeError: a processor with a `__call__` of its own is to be wrapped, which knows nothing of `see` and `read`.
        ValueError: ranks share the heads.
    """
    outer = transformer.attn_processors.items()  # of which some stand for another while they are intercepted
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError(
            "guidance of heads and segments are not for a model after enable_parallelism, which shares them"
        )
    before = {name: x.inner if isinstance(x, InterceptedProcessor) else x for name, x in outer}
    after = {name: wrap(name, processor) for name, processor in before.items()}
    for name, processor in before.items():
        if after[name] is not processor and type(processor).__call__ is not VideoAttnProcessor.__call__:
            raise TypeError(
                f"{name} is a {type(processor).__name__}, which has a __call__ of its own; guidance needs a "
                "VideoAttnProcessor that overrides see, read or cross only"
            )
    _set(transformer, after)
    try:
        yield
    finally:
        _set(transformer, before)


def _set(transformer: Any, processors: Mapping[str, VideoAttnProcessor]) -> None:
    """Set processors, inside of those that intercept them."""
    outer = dict(transformer.attn_processors)
    for name, processor in processors.items():
        if isinstance(outer[name], InterceptedProcessor):
            outer[name].stand_for(processor)
    transformer.set_attn_processor(
        {name: x if isinstance(x, InterceptedProcessor) else processors[name] for name, x in outer.items()}
    )


def self_attention_names(transformer: Any) -> list[str]:
    """Names of the processors of the layers' self-attention, in order."""
    kind = "attn" if transformer.config.conditioning == "joint" else "attn1"
    return [f"blocks.{layer}.{kind}.processor" for layer in range(len(transformer.blocks))]


def check_heads(transformer: Any, heads: Heads, strength: float) -> None:
    """Raises ValueError unless layers and heads exist and the strength is in 0..1."""
    layers, count = len(transformer.blocks), transformer.config.num_attention_heads
    for layer, chosen in heads.items():
        if not 0 <= layer < layers or any(not 0 <= head < count for head in chosen):
            raise ValueError(
                f"pag_heads={{{layer}: {list(chosen)}}} must be within {layers} layers of {count} heads, from 0 on"
            )
    if not 0 <= strength <= 1:
        raise ValueError(f"pag_strength={strength} must be in 0..1")


@contextmanager
def perturbed_heads(transformer: Any, heads: Heads, *, strength: float = 1.0) -> Iterator[None]:
    """Inside, the chosen heads of a `VideoDiT` attend by `(1 - strength) A + strength I`, segments or not.

    Args:
        transformer: the model.
        heads: layer → heads, counted from 0.
        strength: u, in 0..1.

    Raises:
        ValueError: a layer or head that does not exist, or a strength outside.
    """
    check_heads(transformer, heads, strength)
    names, count = self_attention_names(transformer), transformer.config.num_attention_heads
    chosen = {names[layer]: some for layer, some in heads.items()}

    def perturb(name: str, inner: VideoAttnProcessor) -> VideoAttnProcessor:
        if name not in chosen:
            return inner
        return SoftPAGProcessor([strength if head in chosen[name] else 0.0 for head in range(count)], inner)

    with processors(transformer, perturb):
        yield


def guide(
    cond: Tensor,
    *,
    uncond: Tensor | None = None,
    scale: float = 1.0,
    perturbed: Tensor | None = None,
    pag_scale: float = 0.0,
    rescale: float = 0.0,
) -> Tensor:
    """Classifier-free and perturbation guidance of velocities of equal shape.

    `uncond + scale (cond - uncond) + pag_scale (cond - perturbed)`; what is None takes no part. Strong guidance makes
    the result larger: a share `rescale` of it is scaled back to the standard deviation of `cond`, per video
    (arXiv:2305.08891, §3.4).
    """
    out = cond if uncond is None else uncond + scale * (cond - uncond)
    out = out if perturbed is None else out + pag_scale * (cond - perturbed)
    if not rescale:
        return out
    axes = tuple(range(1, out.ndim))
    ratio = cond.std(dim=axes, keepdim=True) / out.std(dim=axes, keepdim=True)
    return out * torch.lerp(torch.ones_like(ratio), ratio, rescale)


def hunt_heads(
    score: Callable[[dict[int, list[int]]], float],
    candidates: Sequence[tuple[int, int]],
    *,
    rounds: int = 1,
    per_round: int = 3,
) -> tuple[dict[int, list[int]], list[float]]:
    """HeadHunter: in each round adds the heads that raise an aim most, each tried beside those already chosen.

    Args:
        score: heads → the aim, larger is better, such as the mean score of clips sampled with these heads and fixed
            noise. It is called `len(candidates)` times or fewer in every round.
        candidates: pairs (layer, head).
        rounds: how often to choose.
        per_round: heads to add at a time.

    Returns:
        The heads, and the aim they reached after each round.

    Raises:
        ValueError: more heads wanted than there are candidates.
    """
    if rounds * per_round > len(candidates):
        raise ValueError(f"rounds={rounds} of per_round={per_round} need more than {len(candidates)} candidates")
    chosen: list[tuple[int, int]] = []
    reached = []
    for _ in range(rounds):
        left = [candidate for candidate in candidates if candidate not in chosen]
        gains = {candidate: score(_by_layer([*chosen, candidate])) for candidate in left}
        chosen += sorted(left, key=lambda candidate: -gains[candidate])[:per_round]
        reached.append(score(_by_layer(chosen)))
    return _by_layer(chosen), reached


def _by_layer(chosen: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    layers: dict[int, list[int]] = {}
    for layer, head in sorted(chosen):
        layers.setdefault(layer, []).append(head)
    return layers
