"""The attention operators: tensors in, tensors out."""

from . import masks
from .agent import agent_attention
from .block_sparse import (
    BlockMask,
    block_sparse_attention,
    block_sparse_attention_lse,
    routing_attention2d,
)
from .linear import linear_attention
from .low_rank import biased_attention
from .neighborhood import (
    merge_attentions,
    na1d,
    na1d_lse,
    na2d,
    na2d_lse,
    na3d,
    na3d_lse,
    sharded_neighborhood_attention,
    sharded_neighborhood_attention_lse,
)
from .tools.explain import explain
from .window import relative_bias, window_attention, window_attention_lse

__all__ = [
    "BlockMask",
    "agent_attention",
    "biased_attention",
    "block_sparse_attention",
    "block_sparse_attention_lse",
    "explain",
    "linear_attention",
    "masks",
    "merge_attentions",
    "na1d",
    "na1d_lse",
    "na2d",
    "na2d_lse",
    "na3d",
    "na3d_lse",
    "relative_bias",
    "routing_attention2d",
    "sharded_neighborhood_attention",
    "sharded_neighborhood_attention_lse",
    "window_attention",
    "window_attention_lse",
]
