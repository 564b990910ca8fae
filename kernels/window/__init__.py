"""Attention inside windows of 1-D, 2-D and 3-D grids: plain, shifted, with a halo."""

from .api import relative_bias, window_attention
from .geometry import Axis

__all__ = ["Axis", "relative_bias", "window_attention"]
