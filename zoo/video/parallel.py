"""Ulysses for a `VideoDiT`: ranks share its tokens, and inside attention its heads (arXiv:2309.14509, §3).

Diffusers' `enable_parallelism` splits the tokens after the patch embedding and joins them after the last projection, by
`PLAN`. In attention each rank gets all tokens of some heads, so that every pattern sees whole videos.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from diffusers.hooks.context_parallel import EquipartitionSharder
from diffusers.models._modeling_parallel import ContextParallelConfig, ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import SeqAllToAllDim
from torch import Tensor

PLAN = {
    "patch_embed": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


def context_config(config: Any) -> ContextParallelConfig | None:
    """The part of a parallel configuration that is about tokens."""
    return config if isinstance(config, ContextParallelConfig) else getattr(config, "context_parallel_config", None)


def check_parallel(config: Any, *, heads: int, patterns: Any) -> None:
    """Refuses, before anything is split, what is not Ulysses or not for these layers.

    Raises:
        ValueError: names the argument or the layer.
    """
    context = context_config(config)
    if context is None:
        return
    if context.ring_degree != 1 or context.ulysses_anything:
        raise ValueError(
            f"ring_degree={context.ring_degree}, ulysses_anything={context.ulysses_anything}: a VideoDiT shares tokens "
            "by ulysses_degree alone"
        )
    if heads % (context.ulysses_degree or 1):
        raise ValueError(f"ulysses_degree={context.ulysses_degree} must divide the {heads} heads of the model")
    for layer, pattern in enumerate(patterns):
        if pattern.type == "local_scan" or pattern.mask == "box_gate" or pattern.heads is not None:
            kind = "a neighborhood for each head" if pattern.heads is not None else pattern.mask or pattern.type
            raise ValueError(f"layer {layer} has {kind}, whose parameters or tokens cannot be shared by ulysses_degree")


class Share:
    """This rank's share of tokens and heads.

    Args:
        context: of the model, set up by diffusers.
    """

    def __init__(self, context: ContextParallelConfig):
        self.mesh = context._ulysses_mesh
        self.group = self.mesh.get_group()
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)

    def check(self, tokens: int, *, training: bool) -> None:
        """Raises ValueError unless the ranks can have equally many tokens, or in training, whose gradients each rank
        would have of its tokens alone."""
        if training:
            raise ValueError("enable_parallelism is for sampling: call eval(), or train with trainer=fsdp")
        if tokens % self.size:
            raise ValueError(f"ulysses_degree={self.size} must divide the {tokens} tokens of the video")

    def own(self, groups: Tensor, tokens: int) -> Tensor:
        """Values of M groups of consecutive tokens, `[B, M, ...]`, for the tokens of this rank; M = 1 stays."""
        if groups.shape[1] == 1:
            return groups
        each = groups.repeat_interleave(tokens // groups.shape[1], dim=1)
        return EquipartitionSharder.shard(each, 1, self.mesh)

    def to_heads(self, x: Tensor) -> Tensor:
        """Some tokens of all heads, `[B, S / ranks, heads, d]`, to all tokens of some heads."""
        return SeqAllToAllDim.apply(self.group, x, 2, 1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """All tokens of some heads, `[B, S, heads / ranks, d]`, to some tokens of all heads."""
        return SeqAllToAllDim.apply(self.group, x, 1, 2)

    def some_heads(self, x: Tensor) -> Tensor:
        """The heads of this rank, of text tokens `[B, L, heads, d]` that every rank has."""
        return x.chunk(self.size, dim=2)[self.rank]

    def all_heads(self, x: Tensor) -> Tensor:
        """All heads of text tokens, of which every rank has some."""
        return EquipartitionSharder.unshard(x, 2, self.mesh)


def share_of(config: Any) -> Share | None:
    """The share of a rank by the parallel configuration that diffusers has set; None where nothing is shared."""
    context = None if config is None else context_config(config)
    return None if context is None else Share(context)
