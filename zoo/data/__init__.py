"""Lightning data modules: digits, still and moving, image and video folders, latents, and whatever timm can read."""

from .digits import Digits
from .images import ImageFolder, TimmDataset
from .latent_videos import VideoLatents
from .masks import MaskFolder
from .moving_digits import MovingDigits
from .shapes import Shapes
from .tables import ImageTable
from .videofolder import VideoFolder

__all__ = [
    "Digits",
    "ImageFolder",
    "ImageTable",
    "MaskFolder",
    "MovingDigits",
    "Shapes",
    "TimmDataset",
    "VideoFolder",
    "VideoLatents",
]
