"""A stand-in for NATTEN: `install()`, and `import natten` gives our operators under its names.

from foveal.kernels.compat.natten import install

install("0.17")        # the order of arguments that the importing code was written for
import natten
"""

from .stand_in import install, uninstall

__all__ = ["install", "uninstall"]
