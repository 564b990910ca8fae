"""Neighborhood attention on 1-D, 2-D and 3-D grids."""

from .api import make_axes, merge_attentions, na1d, na1d_lse, na2d, na2d_lse, na3d, na3d_lse
from .geometry import Axis
from .sharded import sharded_neighborhood_attention, sharded_neighborhood_attention_lse

__all__ = [
    "Axis",
    "make_axes",
    "merge_attentions",
    "na1d",
    "na1d_lse",
    "na2d",
    "na2d_lse",
    "na3d",
    "na3d_lse",
    "sharded_neighborhood_attention",
    "sharded_neighborhood_attention_lse",
]
