"""Choice of the sites of an edit: by kind, place in the model, scale relative to the latents, and layer."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

from ..sites.site import KINDS, Site, resolve_layers

PLACES = {
    "down_blocks": "down",
    "mid_block": "mid",
    "up_blocks": "up",
    "transformer_blocks": "dual",
    "double_stream_blocks": "dual",
    "single_transformer_blocks": "single",
    "single_stream_blocks": "single",
    "blocks": "dual",
    "layers": "single",
    "temporal_transformer_blocks": "temporal",
}


def place(site: Site) -> str:
    """Part of the model that a site is in: "down", "mid", "up", "dual", "single", "temporal", or "refine"."""
    return "refine" if site.kind == "refine" else PLACES.get(site.name.split(".")[0], "dual")


def block_number(site: Site) -> int:
    """Number of the block in its part of the model, 0 in the middle of a UNet."""
    found = re.match(r"[a-z_]+\.(\d+)\.", site.name)
    return 0 if site.name.startswith("mid_block") or found is None else int(found[1])


@dataclass(frozen=True)
class Where:
    """Sites, by parsed names and never by substrings.

    Attributes:
        kinds: some of "self", "cross", "joint", "refine"; all but "refine" when None.
        places: some of "down", "mid", "up" of UNets, "dual", "single", "temporal" of transformers.
        blocks: numbers of the blocks of each place, such as 1 for `up_blocks.1`.
        scales: latent pixels per token along one axis: 4 is latents / 4, 16 x 16 tokens of Stable Diffusion's 64 x 64.
            Transformers have the scale 1.
        layers: numbers of layers, negative ones from the last.

    Raises:
        ValueError: an unknown kind or place.
    """

    kinds: Collection[str] | None = None
    places: Collection[str] | None = None
    blocks: Collection[int] | None = None
    scales: Collection[int] | None = None
    layers: Collection[int] | None = None

    def __post_init__(self) -> None:
        for name, known in (("kinds", KINDS), ("places", {*PLACES.values(), "refine"})):
            given = getattr(self, name)
            if isinstance(given, str) or (given is not None and set(given) - set(known)):
                raise ValueError(f"{name}={given!r} must be a collection of {sorted(known)}")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """The sites, in order.

        Raises:
            ValueError: a layer that does not exist.
        """
        layers = None if self.layers is None else resolve_layers(sites, self.layers)
        return [
            site
            for site in sites
            if (site.kind != "refine" if self.kinds is None else site.kind in self.kinds)
            and (self.places is None or place(site) in self.places)
            and (self.blocks is None or block_number(site) in self.blocks)
            and (self.scales is None or 2**site.level in self.scales)
            and (layers is None or (site.layer in layers and site.kind != "refine"))
        ]

    def __str__(self) -> str:
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        return ", ".join(f"{name}={value}" for name, value in given if value is not None) or "everywhere"
