"""Block-sparse attention over boxes of 1-D, 2-D and 3-D grids, and bi-level routing on top of it."""

from .api import block_sparse_attention
from .mask import BlockMask
from .routing import routing_attention2d

__all__ = ["BlockMask", "block_sparse_attention", "routing_attention2d"]
