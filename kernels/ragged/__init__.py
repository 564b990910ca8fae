"""Attention on batches whose entries have grids of different sizes; see `README.md`."""

from .api import ragged_attention
from .layout import RaggedLayout

__all__ = ["RaggedLayout", "ragged_attention"]
