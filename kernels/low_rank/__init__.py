"""Attention biases as products of thin factors (FlashBias, arXiv:2505.12044)."""

from .attention import biased_attention, pad_head_dim, widen
from .factors import (
    Factors,
    alibi_factors,
    axis_factors,
    factorize,
    grid_positions,
    squared_distance_factors,
    tile_factor,
)

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
