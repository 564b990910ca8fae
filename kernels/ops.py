"""The attention operators: tensors in, tensors out."""

from .explain import explain
from .neighborhood import merge_attentions, na1d, na1d_lse, na2d, na2d_lse, na3d, na3d_lse

__all__ = ["explain", "merge_attentions", "na1d", "na1d_lse", "na2d", "na2d_lse", "na3d", "na3d_lse"]
