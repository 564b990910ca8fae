"""Families of image backbones, one a file; importing this package registers the models of all of them with timm."""

from importlib import import_module
from pkgutil import iter_modules

FAMILIES = sorted(module.name for module in iter_modules(__path__))
for name in FAMILIES:
    import_module(f"{__name__}.{name}")
