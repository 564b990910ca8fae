"""Neighborhood attention on 1-D, 2-D and 3-D grids."""

from .api import make_axes, merge_attentions, na1d, na2d, na3d
from .geometry import Axis
from .sharded import sharded_neighborhood_attention

__all__ = [
    "Axis",
    "make_axes",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "sharded_neighborhood_attention",
]
