"""Attention layers: `nn.Module`s on `[B, *spatial, C]` that own parameters and call `foveal.kernels.ops`."""

from .agent import AgentAttention2d, AgentBranch2d
from .aggregated import GlobalCosineAttention2d, LengthScaledAttention2d, PixelFocusedAttention2d
from .base import ProjectedAttention2d
from .binary import BinaryAttention2d
from .box_gate import BoxGate, gate_loss
from .causal import PostSoftmaxCausalAttention2d
from .connectivity import ConnectivityAttention2d, LearnedConnectivity
from .dense import DenseAttention2d
from .efficient import EfficientAttention2d
from .flow import FlowAttention2d, FlowBranch2d
from .focused import FocusedLinearAttention2d, FocusedLinearBranch2d
from .hilo import HiLo
from .hyena import HyenaConvolution, SineFilter
from .inline import InLineAttention2d, InLineBranch2d
from .linear import LinearAttention, LocalConcentration
from .minimal import MinimalAttention
from .mixing import SparseMlp2d, TokenMlp2d
from .mixture import HeadRouter, balance_loss
from .moving_average import MovingAverage, MovingAverageGatedAttention, ShortLongConvolution
from .neighborhood import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d
from .partial import PartialAttention2d
from .polyline import PolylinePathAttention2d
from .recurrence import (
    RecurrentChunkAttention,
    ScanAttention,
    alibi_slopes,
    exact_step,
    recurrent_chunk_attention,
)
from .routing import BiLevelRoutingAttention2d
from .selection import SelectAndPackAttention2d, selection_loss
from .shift import Shift2d
from .state_space import LocalScanBlock, Scan1d, Scan2d, SelectiveScan
from .triplet import TripletAttention2d
from .window import WindowAttention2d

__all__ = [
    "AgentAttention2d",
    "AgentBranch2d",
    "BiLevelRoutingAttention2d",
    "BinaryAttention2d",
    "BoxGate",
    "ConnectivityAttention2d",
    "DenseAttention2d",
    "EfficientAttention2d",
    "FlowAttention2d",
    "FlowBranch2d",
    "FocusedLinearAttention2d",
    "FocusedLinearBranch2d",
    "GlobalCosineAttention2d",
    "HeadRouter",
    "HiLo",
    "HyenaConvolution",
    "InLineAttention2d",
    "InLineBranch2d",
    "LearnedConnectivity",
    "LengthScaledAttention2d",
    "LinearAttention",
    "LocalConcentration",
    "LocalScanBlock",
    "MinimalAttention",
    "MovingAverage",
    "MovingAverageGatedAttention",
    "NeighborhoodAttention1d",
    "NeighborhoodAttention2d",
    "NeighborhoodAttention3d",
    "PartialAttention2d",
    "PixelFocusedAttention2d",
    "PolylinePathAttention2d",
    "PostSoftmaxCausalAttention2d",
    "ProjectedAttention2d",
    "RecurrentChunkAttention",
    "Scan1d",
    "Scan2d",
    "ScanAttention",
    "SelectAndPackAttention2d",
    "SelectiveScan",
    "Shift2d",
    "ShortLongConvolution",
    "SineFilter",
    "SparseMlp2d",
    "TokenMlp2d",
    "TripletAttention2d",
    "WindowAttention2d",
    "alibi_slopes",
    "balance_loss",
    "exact_step",
    "gate_loss",
    "recurrent_chunk_attention",
    "selection_loss",
]
