"""All systems, shelf by shelf."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from . import layers, networks, operators, registries
from .record import System


@dataclass(frozen=True)
class Shelf:
    """Systems of one kind.

    Attributes:
        name: by which pages refer to it.
        title: heading of its table.
        systems: its rows, in the order of the table.
    """

    name: str
    title: str
    systems: tuple[System, ...]


@cache
def shelves() -> tuple[Shelf, ...]:
    """The shelves in the order of the page; registries are read at the first call."""
    return (
        Shelf("operators", "Operators", operators.OPERATORS),
        Shelf("scores", "Other weights than the softmax", operators.SCORES),
        Shelf("masks", "Masks", registries.masks()),
        Shelf("searches", "Searches for masks, orders, masks that learn", operators.SEARCHES),
        Shelf("heads", "Projections and heads", layers.HEADS),
        Shelf("recurrences", "Recurrences and long convolutions", layers.RECURRENCES),
        Shelf("mixers", "Other layers", layers.MIXERS),
        Shelf("gates", "Gates", layers.GATES),
        Shelf("probes", "Heads and probes", layers.PROBES),
        Shelf("backbones", "Image backbones", registries.backbones()),
        Shelf("restoration", "Image to image", networks.RESTORATION),
        Shelf("pretraining", "Pre-training", networks.PRETRAINING),
        Shelf("training", "Training and data", networks.TRAINING),
        Shelf("video", "Video generation", networks.VIDEO),
        Shelf("steering", "Generators of other people", networks.STEERING),
        Shelf("recipes", "Recipes of `Control`", registries.recipes()),
    )
