"""Attention layers: `nn.Module`s on `[B, *spatial, C]` that own parameters and call `foveal.kernels.ops`."""

from .agent import AgentAttention2d, AgentBranch2d
from .base import ProjectedAttention2d
from .box_gate import BoxGate
from .focused import FocusedLinearAttention2d, FocusedLinearBranch2d
from .hilo import HiLo
from .inline import InLineAttention2d, InLineBranch2d
from .linear import LinearAttention, LocalConcentration
from .neighborhood import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d
from .routing import BiLevelRoutingAttention2d
from .window import WindowAttention2d

__all__ = [
    "AgentAttention2d",
    "AgentBranch2d",
    "BiLevelRoutingAttention2d",
    "BoxGate",
    "FocusedLinearAttention2d",
    "FocusedLinearBranch2d",
    "HiLo",
    "InLineAttention2d",
    "InLineBranch2d",
    "LinearAttention",
    "LocalConcentration",
    "NeighborhoodAttention1d",
    "NeighborhoodAttention2d",
    "NeighborhoodAttention3d",
    "ProjectedAttention2d",
    "WindowAttention2d",
]
