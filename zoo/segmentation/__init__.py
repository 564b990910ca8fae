"""Segmentation: any backbone of timm that gives maps, and a head that names every pixel."""

from .head import PyramidHead
from .model import Segmenter

__all__ = ["PyramidHead", "Segmenter"]
