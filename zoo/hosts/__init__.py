"""Layouts of image backbones that take an attention: `Swin(attn=factory)`.

`factory(place, **options)` gets a `Place` and returns a module; see there.
"""

from .blocks import Place
from .cswin import CSWin
from .deit import DeiT
from .isotropic import Isotropic
from .nat import NAT
from .pvt import PVT, PVTv2
from .spach import Spach
from .swin import Swin

__all__ = ["NAT", "PVT", "CSWin", "DeiT", "Isotropic", "PVTv2", "Place", "Spach", "Swin"]
