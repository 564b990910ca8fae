"""Self-supervised pre-training of vision transformers: orders of patches, and models with their losses."""

from .autoencoder import BroadContext, MaskedAutoencoder, VisibleViT, absolute_loss, follow, relative_loss
from .crossview import CrossViewCompletion
from .masking import color_noise, color_order, hard_order, pattern_order, random_order, restore, visible_count
from .positions import DroppedPositions
from .views import second_view

__all__ = [
    "BroadContext",
    "CrossViewCompletion",
    "DroppedPositions",
    "MaskedAutoencoder",
    "VisibleViT",
    "absolute_loss",
    "color_noise",
    "color_order",
    "follow",
    "hard_order",
    "pattern_order",
    "random_order",
    "relative_loss",
    "restore",
    "second_view",
    "visible_count",
]
