"""Attention layers: `nn.Module`s on `[B, *spatial, C]` that own parameters and call `foveal.kernels.ops`."""

from .hilo import HiLo
from .neighborhood import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d
from .routing import BiLevelRoutingAttention2d

__all__ = [
    "BiLevelRoutingAttention2d",
    "HiLo",
    "NeighborhoodAttention1d",
    "NeighborhoodAttention2d",
    "NeighborhoodAttention3d",
]
