"""Families of image backbones, one a file; importing this package registers their models with timm."""

from . import agent, biformer, flatten, inline, l2vit, litv2, natten

__all__ = ["agent", "biformer", "flatten", "inline", "l2vit", "litv2", "natten"]
