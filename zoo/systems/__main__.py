"""Write pages of systems: `python -m foveal.zoo.systems docs/systems.md docs/variants.md`."""

import sys
from pathlib import Path

from .page import write

if len(sys.argv) < 2:
    raise SystemExit("usage: python -m foveal.zoo.systems PAGE…")
for argument in sys.argv[1:]:
    write(Path(argument))
