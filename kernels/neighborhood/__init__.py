"""Neighborhood attention on 1-D, 2-D and 3-D grids."""

from .api import make_axes, merge_attentions, na1d, na1d_lse, na2d, na2d_lse, na3d, na3d_lse
from .geometry import Axis

__all__ = ["Axis", "make_axes", "merge_attentions", "na1d", "na1d_lse", "na2d", "na2d_lse", "na3d", "na3d_lse"]
