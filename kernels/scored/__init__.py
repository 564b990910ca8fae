"""Scored attention: weights that are another function of logits than their softmax, masks by columns, statistics."""

from .api import scored_attention
from .columns import ColumnMask, ring_positions
from .filtering import Filter
from .grouped import Landmark
from .mixing import MultiToken
from .ordered import CoPE, Path, Selective
from .plain import Signed, Softmax, Softplus
from .regression import LocalLinear, Parallax
from .scaled import scaled_attention
from .score import Score
from .statistics import AttentionStatistics, attention_statistics

__all__ = [
    "AttentionStatistics",
    "CoPE",
    "ColumnMask",
    "Filter",
    "Landmark",
    "LocalLinear",
    "MultiToken",
    "Parallax",
    "Path",
    "Score",
    "Selective",
    "Signed",
    "Softmax",
    "Softplus",
    "attention_statistics",
    "ring_positions",
    "scaled_attention",
    "scored_attention",
]
