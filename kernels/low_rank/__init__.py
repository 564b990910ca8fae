"""Attention biases as products of thin factors (FlashBias, arXiv:2505.12044)."""

from .api import biased_attention
from .factors import (
    Factors,
    alibi_factors,
    axis_factors,
    factorize,
    grid_positions,
    squared_distance_factors,
    tile_factor,
)
from .widened import pad_head_dim, widen

__all__ = [
    "Factors",
    "alibi_factors",
    "axis_factors",
    "biased_attention",
    "factorize",
    "grid_positions",
    "pad_head_dim",
    "squared_distance_factors",
    "tile_factor",
    "widen",
]
