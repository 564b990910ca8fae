"""Video generation: a diffusion transformer whose attention is chosen layer by layer."""

from .kv_cache import KVCache
from .transformer import VideoDiT

__all__ = ["KVCache", "VideoDiT"]
