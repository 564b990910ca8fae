"""Systems that were looked at and left out, with the reason."""

from typing import NamedTuple


class Absent(NamedTuple):
    """A system that the library does not have.

    Attributes:
        name: of the system.
        source: as in `System`; "" where none is known.
        reason: why it is left out, and what to take instead.
    """

    name: str
    source: str
    reason: str


ABSENT = (
    Absent("SEA, sparse linear attention by estimated maps", "arXiv:2310.01777", "needs a network per layer"),
    Absent("TPLA, latent attention in shards", "", "shards a cache of keys that image and video models do not have"),
    Absent("Flux attention, a router per layer", "", "`HeadPlan` says it per layer, head and step without a network"),
    Absent("Flashlight", "", 'is a compiler; `impl="torch"` is the eager form that compilers fuse'),
)
