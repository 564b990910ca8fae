"""Output of the video pipeline."""

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput


@dataclass
class VideoDiTPipelineOutput(BaseOutput):
    """Videos.

    Attributes:
        frames: of all videos, as `output_type` says: "np" `[B, T, H, W, C]` and "pt" `[B, T, C, H, W]` in 0..1, "pil"
            a list of images for each, "gif" and "mp4" a path for each, "latent" `[B, C, T, H, W]` as the model sees it.
    """

    frames: Any
