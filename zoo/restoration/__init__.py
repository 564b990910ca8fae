"""Networks from image to image: super-resolution, denoising, removal of shadows, compression, style transfer."""

from .a2n import A2N
from .base import Restorer, restore_in_tiles, self_ensemble
from .catanet import CATANet
from .rasm import ShadowRemover
from .rat import RegionAttentionTransformer
from .segpic import RegionCodec
from .stya2k import StyleTransfer

__all__ = [
    "A2N",
    "CATANet",
    "RegionAttentionTransformer",
    "RegionCodec",
    "Restorer",
    "ShadowRemover",
    "StyleTransfer",
    "restore_in_tiles",
    "self_ensemble",
]
