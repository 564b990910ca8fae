"""Heads of any timm model: how much each matters, which ranks they use, models with fewer heads or thinner keys."""

from .attentions import HeadSite, find_attentions, head_gates
from .importance import choose_heads, head_importance, prune_heads
from .latent import HeadRank, rank_probe, to_latent

__all__ = [
    "HeadRank",
    "HeadSite",
    "choose_heads",
    "find_attentions",
    "head_gates",
    "head_importance",
    "prune_heads",
    "rank_probe",
    "to_latent",
]
