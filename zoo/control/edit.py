"""Edit: the one interface between a paper's idea and the attention operations of a generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..sites import Call, Layout, Moment, Schedule, Site
from .rows import Rows
from .terms import Term
from .where import Where

PARTS = {"q": "query", "k": "key", "v": "value"}  # letters of edits → fields of `Call`


@dataclass(frozen=True)
class Context:
    """One forward at one site.

    Attributes:
        site, layout, moment: see `foveal.zoo.sites`.
        rows: of the batch, by name.
        words: token numbers of the words that the Control was given.
    """

    site: Site
    layout: Layout
    moment: Moment
    rows: Rows
    words: Mapping[str, tuple[int, ...]]

    def span(self, call: Call, stream: str, *, keys: bool) -> tuple[int, int] | None:
        """First token and end of a stream among the keys or queries of an operation; None when it is not there.

        "image" and "video" both name the grid that is made.
        """
        streams = call.operation.keys if keys else call.operation.queries
        tokens = (call.key if keys else call.query).shape[1]
        if stream in ("image", "video"):
            stream = next((name for name in ("image", "video") if name in streams), stream)
        if stream not in streams:
            return None
        if len(streams) == 1:
            return (0, tokens)
        first, end = self.layout.spans(self.site, streams, tokens)[stream]
        return (first, end) if end > first else None

    def tokens_of(self, names: Sequence[str]) -> tuple[int, ...]:
        """Token numbers of some words, together."""
        return tuple(sorted({token for name in names for token in self.words[name]}))

    def places_of(self, names: Sequence[str], span: tuple[int, int]) -> list[int]:
        """Places of the tokens of some words among the keys or queries of an operation.

        Args:
            names: of words.
            span: first token and end of the text.

        Raises:
            ValueError: a token past the end of the text.
        """
        count = span[1] - span[0]
        for name in names:
            if (last := max(self.words[name], default=0)) >= count:
                raise ValueError(f"word {name!r} is token {last} of {count} text tokens at {self.site.path}")
        return [span[0] + token for token in self.tokens_of(names)]


class Edit:
    """Something that is done to attention; subclasses override what they need.

    An operation runs in this order: `qkv` of every edit, `edit_terms` of every edit, the attention itself (by the one
    edit that owns it), `read` of the observed columns, `out` of every edit.

    Attributes:
        where, schedule: sites and steps.
        guidance: rows of "cond", "uncond" or "both"; a forward without any of them is left alone.
        owner: whether the edit itself attends. One edit of a site may.
        needs: why the edit makes a map of queries x keys, or their logits; empty when it makes none.
        words: names of the words that it uses.
        branches: names of the branches that it uses.
        now: whether the schedule holds in the forward that runs, for hooks.
    """

    where: Where = Where()
    schedule: Schedule = Schedule()
    guidance: str = "cond"
    owner = False
    needs = ""
    words: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()
    now = True

    def sites(self, sites: Sequence[Site]) -> list[Site]:
        """The sites that the edit works at."""
        chosen = self.where.select(sites)
        if self.schedule.layers is not None:
            layers = {id(site) for site in Where(layers=self.schedule.layers).select(sites)}
            chosen = [site for site in chosen if id(site) in layers]
        return chosen

    def begin(self) -> None:
        """Forget what belongs to the image before."""

    def check(self, control: Any) -> None:
        """Raises ValueError when a Control cannot serve the edit, before anything is changed."""

    def hooks(self, control: Any) -> list[Any]:
        """Hooks on modules of the generator, handles with `remove`, for what attention operations do not show."""
        return []

    def plan(self, context: Context) -> Any:
        """Tensors and flags of a forward at a site, decided before the model runs; None leaves the site alone."""
        return context

    def qkv(self, call: Call, plan: Any) -> Call:
        """The operation with other queries, keys or values."""
        return call

    def edit_terms(self, terms: list[Term], call: Call, plan: Any) -> list[Term]:
        """The terms of the maps, edited."""
        return terms

    def attend(self, call: Call, plan: Any, rows: Sequence[int], following: Callable[[Call], Tensor]) -> Tensor:
        """Output of the operation, for owners."""
        return following(call)

    def columns(self, call: Call, plan: Any) -> Tensor | None:
        """Columns of the edited map to observe: `[keys, columns]`, the map is multiplied by; None for none."""
        return None

    def read(self, call: Call, plan: Any, maps: Tensor) -> None:
        """Takes the observed columns, `[B, queries, heads, columns]`."""

    def out(self, call: Call, plan: Any, out: Tensor) -> Tensor:
        """The output `[B, queries, heads, d]`, changed."""
        return out

    def latents(self, step: int, total: int | None, latents: Tensor, control: Any) -> Tensor:
        """The latents after a step, changed; through `Control.callback`."""
        return latents

    def __str__(self) -> str:
        return type(self).__name__
