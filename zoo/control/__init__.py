"""Steer generators through their attention, without attention maps.

from foveal.zoo.control import Control, edits, recipes

with Control(pipe, edits.KeyMean("reference", delta=1.15)) as control:
    image = pipe(image=photo, prompt="make the rose blue").images[0]
print(control.report())
"""

from ..sites import Schedule
from . import edits, recipes
from .control import Control, explain
from .edit import Context, Edit
from .heatmap import heatmap
from .rows import Rows
from .where import Where
from .words import cross_times, refinement_map, replacement_map, word_tokens

__all__ = [
    "Context",
    "Control",
    "Edit",
    "Rows",
    "Schedule",
    "Where",
    "cross_times",
    "edits",
    "explain",
    "heatmap",
    "recipes",
    "refinement_map",
    "replacement_map",
    "word_tokens",
]
