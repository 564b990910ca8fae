"""Families of image backbones, one a file; importing this package registers the models of all of them with timm."""

from importlib import import_module
from pkgutil import iter_modules

for name in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{name}")
