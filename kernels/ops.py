"""The attention operators: tensors in, tensors out."""

from . import masks
from .agent import agent_attention
from .block_sparse import (
    BlockMask,
    SkipCalibration,
    block_sparse_attention,
    calibrate_skip,
    routing_attention2d,
    skipped_blocks,
)
from .linear import linear_attention
from .low_rank import biased_attention
from .neighborhood import (
    merge_attentions,
    na1d,
    na2d,
    na3d,
    sharded_neighborhood_attention,
)
from .ragged import RaggedLayout, ragged_attention
from .scan import long_convolution, scan_attention, scan_order
from .scored import attention_statistics, scaled_attention, scored_attention
from .tools.explain import explain
from .window import relative_bias, window_attention

__all__ = [
    "BlockMask",
    "RaggedLayout",
    "SkipCalibration",
    "agent_attention",
    "attention_statistics",
    "biased_attention",
    "block_sparse_attention",
    "calibrate_skip",
    "explain",
    "linear_attention",
    "long_convolution",
    "masks",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "ragged_attention",
    "relative_bias",
    "routing_attention2d",
    "scaled_attention",
    "scan_attention",
    "scan_order",
    "scored_attention",
    "sharded_neighborhood_attention",
    "skipped_blocks",
    "window_attention",
]
