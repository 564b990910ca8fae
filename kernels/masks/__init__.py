"""Masks of block-sparse attention, one paper a file: from queries and keys, or from a grid alone, to a `BlockMask`."""

from .bsa import bsa
from .clear import clear, clear_pooled
from .duo import duo
from .flexprefill import flexprefill
from .freeswim import freeswim
from .grid_offsets import grid_offsets
from .moa import moa
from .moba import moba
from .nabla import nabla, nabla_prior
from .power import power
from .psa import psa, psa_importance, psa_levels, pyramid, pyramid_mask
from .radial import radial
from .registry import REGISTRY
from .s2 import s2, s2_causal, s2_relative
from .select import HeadChoice, HeadPlan, box_scores, keep, static_boxes, to_mask
from .sla import sla, sla_linear
from .sparge import sparge
from .sta import sta
from .vmoba import vmoba, vmoba_block
from .vsa import vsa, vsa_coarse

__all__ = [
    "REGISTRY",
    "HeadChoice",
    "HeadPlan",
    "box_scores",
    "bsa",
    "clear",
    "clear_pooled",
    "duo",
    "flexprefill",
    "freeswim",
    "grid_offsets",
    "keep",
    "moa",
    "moba",
    "nabla",
    "nabla_prior",
    "power",
    "psa",
    "psa_importance",
    "psa_levels",
    "pyramid",
    "pyramid_mask",
    "radial",
    "s2",
    "s2_causal",
    "s2_relative",
    "sla",
    "sla_linear",
    "sparge",
    "sta",
    "static_boxes",
    "to_mask",
    "vmoba",
    "vmoba_block",
    "vsa",
    "vsa_coarse",
]
