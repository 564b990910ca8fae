"""Networks from image to image: super-resolution, denoising, removal of shadows."""

from .a2n import A2N
from .base import Restorer, restore_in_tiles, self_ensemble
from .catanet import CATANet
from .rasm import ShadowRemover
from .rat import RegionAttentionTransformer

__all__ = [
    "A2N",
    "CATANet",
    "RegionAttentionTransformer",
    "Restorer",
    "ShadowRemover",
    "restore_in_tiles",
    "self_ensemble",
]
