"""`python -m foveal.cli` is the command `foveal`."""

from .app import main

main()
