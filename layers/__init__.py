"""Attention layers: `nn.Module`s on `[B, *spatial, C]` that own parameters and call `foveal.kernels.ops`."""

from .neighborhood import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d

__all__ = ["NeighborhoodAttention1d", "NeighborhoodAttention2d", "NeighborhoodAttention3d"]
