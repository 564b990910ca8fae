"""foveal: vision backbones and video generators built on efficient attention."""

__version__ = "0.1.0"
