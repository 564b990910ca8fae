"""Edits: one primitive a file; recipes are made of them."""

from .blend import Blend, blend, blend_masks
from .contexts import Contexts
from .dim_keys import DimKeys
from .emphasize import Emphasize
from .extend import Extend
from .features import BlendFeatures, fuse_features
from .fuse import Fuse, compose_regions
from .importance import importance
from .keep_reference import KeepReference
from .key_mean import KeyMean
from .latent_loss import LatentLoss
from .merge_tokens import MergeTokens
from .mixed_resolution import Foveation, foveate, mixed_attention
from .motion_energy import MotionEnergy, enhance
from .overwrite import overwrite_logits
from .paths import FirstFrame, attend_along, path_tokens
from .perturb import Perturb
from .positions import CopySpatialPositions
from .recall import Keep, Recall
from .refine_maps import attend_mean, smooth_on_graph, spread
from .refined_mask import RefinedMask
from .region_bias import RegionBias
from .regulate import Regulate, gaussians, regulate, regulation_loss
from .reweight import Reweight
from .row_guidance import RowGuidance
from .self_maps import SelfMaps
from .share import Share
from .sharpen import Sharpen, sharpen
from .temperature import Temperature
from .transfer import Transfer, alignment, gather_map
from .virtual_inversion import VirtualInversion
from .visible import Groups, Members, Visible, attend_by_groups, relate
from .word_mask import Kept, WordMask

__all__ = [
    "Blend",
    "BlendFeatures",
    "Contexts",
    "CopySpatialPositions",
    "DimKeys",
    "Emphasize",
    "Extend",
    "FirstFrame",
    "Foveation",
    "Fuse",
    "Groups",
    "Keep",
    "KeepReference",
    "Kept",
    "KeyMean",
    "LatentLoss",
    "Members",
    "MergeTokens",
    "MotionEnergy",
    "Perturb",
    "Recall",
    "RefinedMask",
    "RegionBias",
    "Regulate",
    "Reweight",
    "RowGuidance",
    "SelfMaps",
    "Share",
    "Sharpen",
    "Temperature",
    "Transfer",
    "VirtualInversion",
    "Visible",
    "WordMask",
    "alignment",
    "attend_along",
    "attend_by_groups",
    "attend_mean",
    "blend",
    "blend_masks",
    "compose_regions",
    "enhance",
    "foveate",
    "fuse_features",
    "gather_map",
    "gaussians",
    "importance",
    "mixed_attention",
    "overwrite_logits",
    "path_tokens",
    "regulate",
    "regulation_loss",
    "relate",
    "sharpen",
    "smooth_on_graph",
    "spread",
]
