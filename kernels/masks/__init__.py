"""Masks of block-sparse attention, one paper a file: from queries and keys, or from a grid alone, to a `BlockMask`."""

from .anchor import anchor
from .bsa import bsa
from .clear import clear, clear_pooled
from .content_blocks import content_blocks, lay_out
from .dma import dma
from .duo import duo
from .flexprefill import flexprefill
from .freeswim import freeswim
from .grid_offsets import grid_offsets
from .hip import hip
from .longheads import longheads
from .moa import moa
from .moba import moba
from .nabla import nabla, nabla_prior
from .orders import axis_order, content_order, gilbert_order, inverse_order
from .paro import paro, paro_block, paro_orders
from .power import power
from .psa import psa, psa_importance, psa_levels, pyramid, pyramid_mask
from .radial import radial
from .registry import REGISTRY
from .s2 import s2, s2_causal, s2_relative
from .sale import sale
from .search import (
    gated,
    head_recalls,
    join,
    mask_influence,
    plan_by_gates,
    plan_by_influence,
    plan_by_recall,
    plan_mask,
)
from .select import HeadChoice, HeadPlan, block_scores, keep, static_blocks, to_mask
from .sla import sla, sla_linear
from .sparge import sparge
from .sta import sta
from .svg import svg, svg_online
from .two_level import sparsity_schedule, two_level
from .vmoba import vmoba, vmoba_block
from .vsa import vsa, vsa_coarse

__all__ = [
    "REGISTRY",
    "HeadChoice",
    "HeadPlan",
    "anchor",
    "axis_order",
    "block_scores",
    "bsa",
    "clear",
    "clear_pooled",
    "content_blocks",
    "content_order",
    "dma",
    "duo",
    "flexprefill",
    "freeswim",
    "gated",
    "gilbert_order",
    "grid_offsets",
    "head_recalls",
    "hip",
    "inverse_order",
    "join",
    "keep",
    "lay_out",
    "longheads",
    "mask_influence",
    "moa",
    "moba",
    "nabla",
    "nabla_prior",
    "paro",
    "paro_block",
    "paro_orders",
    "plan_by_gates",
    "plan_by_influence",
    "plan_by_recall",
    "plan_mask",
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
    "sale",
    "sla",
    "sla_linear",
    "sparge",
    "sparsity_schedule",
    "sta",
    "static_blocks",
    "svg",
    "svg_online",
    "to_mask",
    "two_level",
    "vmoba",
    "vmoba_block",
    "vsa",
    "vsa_coarse",
]
