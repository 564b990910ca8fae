"""Lightning data modules: the digits inside scikit-learn, image folders, and whatever timm can read."""

from .digits import Digits
from .images import ImageFolder, TimmDataset

__all__ = ["Digits", "ImageFolder", "TimmDataset"]
