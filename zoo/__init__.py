"""Importing this package registers the models with timm: `timm.create_model("natten_dinat_s")`.

It needs torch and timm only; tasks, data and video models are imported on their own.
"""

from . import backbones
from .accelerate import accelerate, decelerate
from .adapters import use_kernels
from .control import Control

__all__ = ["Control", "accelerate", "backbones", "decelerate", "use_kernels"]
