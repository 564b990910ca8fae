"""Video generation: a diffusion transformer whose attention is chosen layer by layer."""

from .guidance import hunt_heads, perturbed_heads
from .kv_cache import KVCache
from .pipeline import VideoDiTPipeline, VideoDiTPipelineOutput
from .segments import Segments, extend_scenes
from .transformer import VideoDiT

__all__ = [
    "KVCache",
    "Segments",
    "VideoDiT",
    "VideoDiTPipeline",
    "VideoDiTPipelineOutput",
    "extend_scenes",
    "hunt_heads",
    "perturbed_heads",
]
