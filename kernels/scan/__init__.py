"""Scan attention: tokens read a state that those before them wrote, with decay and the delta rule, in both directions."""

from .api import scan_attention
from .convolution import long_convolution
from .orders import scan_order

__all__ = ["long_convolution", "scan_attention", "scan_order"]
