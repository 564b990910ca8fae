"""Block-sparse attention over blocks of 1-D, 2-D and 3-D grids, and bi-level routing on top of it."""

from .api import block_sparse_attention
from .calibrate import calibrate_skip, skipped_blocks
from .mask import BlockMask
from .routing import routing_attention2d
from .skip import SkipCalibration

__all__ = [
    "BlockMask",
    "SkipCalibration",
    "block_sparse_attention",
    "calibrate_skip",
    "routing_attention2d",
    "skipped_blocks",
]
