"""The command `foveal`: one file a command, registered in `app`. Importing it imports neither timm nor lightning."""

from .app import app, main

__all__ = ["app", "main"]
