"""Scan attention: tokens read a state that others wrote before them, with decay and the delta rule, either way."""

from .api import scan_attention
from .convolution import long_convolution
from .orders import scan_order

__all__ = ["long_convolution", "scan_attention", "scan_order"]
