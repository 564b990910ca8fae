"""Lightning data modules: digits, still and moving, image and video folders, and whatever timm can read."""

from .digits import Digits
from .images import ImageFolder, TimmDataset
from .moving_digits import MovingDigits

__all__ = ["Digits", "ImageFolder", "MovingDigits", "TimmDataset"]
