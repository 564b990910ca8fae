"""The attention operators: tensors in, tensors out."""

from .agent import agent_attention
from .explain import explain
from .neighborhood import merge_attentions, na1d, na1d_lse, na2d, na2d_lse, na3d, na3d_lse
from .window import relative_bias, window_attention, window_attention_lse

__all__ = [
    "agent_attention",
    "explain",
    "merge_attentions",
    "na1d",
    "na1d_lse",
    "na2d",
    "na2d_lse",
    "na3d",
    "na3d_lse",
    "relative_bias",
    "window_attention",
    "window_attention_lse",
]
