"""Importing this package registers the models with timm: `timm.create_model("natten_dinat_s")`."""

from . import dinat

__all__ = ["dinat"]
