"""The multi-head attentions of any model: their heads, where the heads' outputs meet, and what holds their sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TABLES = {"relative_position_bias_table": 1, "rpb": 0}  # parameters per head, and the axis of heads


@dataclass(frozen=True)
class HeadSite:
    """One attention.

    Attributes:
        name: of the module in the model.
        module: has `qkv` (rows: query, key, value, each head by head), `proj` and `num_heads`.
        heads, head_dim: their numbers.
    """

    name: str
    module: Any
    heads: int
    head_dim: int


def find_attentions(model: nn.Module) -> list[HeadSite]:
    """Attentions with `qkv`, `proj` and `num_heads`, as timm's ViT and Swin and foveal's layers have them, in order.

    Raises:
        ValueError: there is none.
    """
    sites = []
    for name, module in model.named_modules():
        qkv, proj, heads = (getattr(module, n, None) for n in ("qkv", "proj", "num_heads"))
        if not isinstance(proj, nn.Linear) or not isinstance(heads, int) or qkv is None:
            continue
        if getattr(qkv, "out_features", None) == 3 * proj.in_features and proj.in_features % heads == 0:
            sites.append(HeadSite(name, module, heads, proj.in_features // heads))
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no attention of linear layers qkv and proj with num_heads, one key head a head"
        )
    return sites


@contextmanager
def head_gates(model: nn.Module, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the output of heads, before the output projection, while the context is open.

    Args:
        model: any model of `find_attentions`; restored afterwards, also after an exception.
        gates: by name of attention, factors `[heads]`, or `[B, heads]` for each image of a batch.

    Raises:
        ValueError: an unknown attention, or another number of heads.
    """
    sites = {site.name: site for site in find_attentions(model)}
    for name, gate in gates.items():
        if name not in sites:
            raise ValueError(f"gates names {name!r}; expected one of {list(sites)}")
        if gate.shape[-1] != sites[name].heads:
            raise ValueError(f"gates[{name!r}].shape={tuple(gate.shape)} must end in {sites[name].heads} heads")

    def hook(gate: Tensor, heads: int):
        def scale(module: nn.Module, inputs: tuple) -> tuple:
            x = inputs[0]
            factor = gate.to(x)
            if factor.dim() == 2:  # windows of an image stand together in the batch
                factor = factor.repeat_interleave(x.shape[0] // factor.shape[0], 0)
                factor = factor.view(x.shape[0], *(1,) * (x.dim() - 2), heads)
            return ((x.unflatten(-1, (heads, -1)) * factor[..., None]).flatten(-2), *inputs[1:])

        return scale

    handles = [
        sites[name].module.proj.register_forward_pre_hook(hook(gate, sites[name].heads)) for name, gate in gates.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ones_of(sites: list[HeadSite], batch: int | None = None) -> dict[str, Tensor]:
    """Gates that change nothing, `[heads]` or `[batch, heads]`."""
    shape = () if batch is None else (batch,)
    return {site.name: torch.ones(*shape, site.heads, device=site.module.proj.weight.device) for site in sites}
