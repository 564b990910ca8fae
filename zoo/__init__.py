"""Importing this package registers the models with timm: `timm.create_model("natten_dinat_s")`.

It needs torch and timm only; tasks, data and video models are imported on their own.
"""

from . import agent_cswin, agent_deit, agent_pvt, agent_swin, biformer, dinat, dinat_s, l2vit, litv2, nat_isotropic
from .adapters import use_kernels

__all__ = [
    "agent_cswin",
    "agent_deit",
    "agent_pvt",
    "agent_swin",
    "biformer",
    "dinat",
    "dinat_s",
    "l2vit",
    "litv2",
    "nat_isotropic",
    "use_kernels",
]
