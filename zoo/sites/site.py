"""One attention of a generator: where it is, what it attends with, and the order of its tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

KINDS = ("self", "cross", "joint", "refine")


@dataclass(frozen=True)
class Operation:
    """Token streams of one attention operation, in the order in which they are concatenated.

    Attributes:
        queries, keys: names of streams: "video", "image", "text", "reference" (images that condition), "padding"
            (tokens without content that are visible nevertheless), "audio", "past" (earlier frames in a cache).
    """

    queries: tuple[str, ...]
    keys: tuple[str, ...]

    @property
    def main(self) -> str | None:
        """The stream on the grid that queries and keys share, "video" or "image"; None without one."""
        return next((name for name in ("video", "image") if name in self.queries and name in self.keys), None)


@dataclass(frozen=True)
class Site:
    """An attention of a generator.

    Attributes:
        name: of the module inside its model, such as "blocks.3.attn1".
        layer: number of the block in order of execution, counted over all kinds of blocks of the model.
        kind: "self" (tokens of the grid among themselves), "joint" (text tokens attend along), "cross" (to text or
            other conditions) or "refine" (before the blocks, of the text alone or the image alone).
        heads, head_dim: attention heads and their size.
        operations: the attention operations that one call runs, in order; the last is repeated if there are more.
        axes: axes of the model's grid (t, h, w) that the tokens of one sequence span; None for all.
        level: of a UNet, how often the latents were halved.
        component: name of the model in its pipeline, such as "transformer_2"; empty for a model of its own.
        mask_hides_text_only: whether an attention mask of the model never hides tokens of the grid from each other.
        pattern: of a layer that is not dense by itself, what it is.
        module: the attention module.
    """

    name: str
    layer: int
    kind: str
    heads: int
    head_dim: int
    operations: tuple[Operation, ...]
    axes: tuple[int, ...] | None = None
    level: int = 0
    component: str = ""
    mask_hides_text_only: bool = False
    pattern: str = "dense"
    module: nn.Module = field(default=None, repr=False, compare=False)  # type: ignore[assignment]

    @property
    def path(self) -> str:
        """The name with that of the component before it."""
        return f"{self.component}.{self.name}" if self.component else self.name

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams of the keys, in order."""
        return self.operations[-1].keys

    def operation(self, index: int) -> Operation:
        """The operation that a call runs as number `index`."""
        return self.operations[min(index, len(self.operations) - 1)]


def select(
    sites: Sequence[Site], *, kinds: Collection[str] | None = None, layers: Collection[int] | None = None
) -> list[Site]:
    """The sites of these kinds and layers, in order.

    Args:
        sites: found by `find`.
        kinds: some of "self", "cross", "joint", "refine"; all when None.
        layers: numbers of layers, negative ones from the last; all when None.

    Raises:
        ValueError: an unknown kind, or a layer that no site has.
    """
    if kinds is not None and (unknown := sorted(set(kinds) - set(KINDS))):
        raise ValueError(f"kinds={unknown} must be some of {KINDS}")
    chosen = None if layers is None else resolve_layers(sites, layers)
    return [s for s in sites if (kinds is None or s.kind in kinds) and (chosen is None or s.layer in chosen)]


def resolve_layers(sites: Sequence[Site], layers: Collection[Any]) -> set[int]:
    """Numbers of layers, negative ones counted from the last layer of the blocks.

    Raises:
        ValueError: a layer that no site has.
    """
    known = {s.layer for s in sites if s.kind != "refine"}
    count = max(known, default=-1) + 1
    resolved = {n + count if n < 0 else n for n in layers}
    if wrong := sorted(resolved - known):
        raise ValueError(f"layers={sorted(layers)} must be within the {count} layers of the model; {wrong} are not")
    return resolved
