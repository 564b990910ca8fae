"""Importing this package registers the models with timm: `timm.create_model("natten_dinat_s")`.

It needs torch and timm only; tasks, data and video models are imported on their own.
"""

from . import dinat, dinat_s, nat_isotropic

__all__ = ["dinat", "dinat_s", "nat_isotropic"]
