"""Probes: a head on the features of a frozen model, attentive, linear or by nearest neighbours."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.pooling import POOLINGS, HeadOutput, TokenHead


class Probe(nn.Module):
    """A trunk and a head on its tokens.

    A frozen trunk has no gradients and stays in evaluation mode, whatever mode the probe is in.

    Args:
        trunk: a timm model without its own head.
        head: takes tokens `[B, N, dim]` and prefix tokens.
        freeze: the trunk.
        layer: block, or stage of a hierarchical model, whose output is probed; negative ones count from the last.
        norm: apply the final norm of the trunk to them.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, *, freeze: bool = True, layer: int = -1, norm: bool = True):
        super().__init__()
        self.trunk, self.head, self.freeze, self.layer, self.norm = trunk, head, freeze, layer, norm
        if freeze:
            trunk.requires_grad_(False)
            trunk.eval()

    def train(self, mode: bool = True) -> Probe:
        """Set the mode of the head, and of a trunk that learns."""
        super().train(mode)
        if self.freeze:
            self.trunk.eval()
        return self

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens `[B, N, dim]` and prefix tokens `[B, P, dim]` of the probed layer."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            return tokens_of(self.trunk, images, layer=self.layer, norm=self.norm)

    def output(self, images: Tensor) -> HeadOutput:
        """Logits with the attention of the head."""
        return self.head(*self.features(images))

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to logits `[B, classes]`."""
        return self.output(images).logits


def tokens_of(trunk: nn.Module, images: Tensor, *, layer: int = -1, norm: bool = True) -> tuple[Tensor, Tensor | None]:
    """Tokens of a layer of any timm model with `forward_intermediates`.

    Returns:
        `[B, N, dim]`, and the prefix tokens `[B, P, dim]` of a vision transformer or None.

    Raises:
        ValueError: a model without intermediate features, or a layer that is not there.
    """
    run: Any = getattr(trunk, "forward_intermediates", None)
    if run is None:
        raise ValueError(f"{type(trunk).__name__} has no forward_intermediates: its features cannot be probed")
    count = len(trunk.blocks) if hasattr(trunk, "num_prefix_tokens") else len(trunk.feature_info)  # pyright: ignore
    if not -count <= layer < count:
        raise ValueError(f"layer={layer} must lie in [-{count}, {count})")
    index = layer % count
    if not hasattr(trunk, "num_prefix_tokens"):
        (found,) = run(images, indices=[index], norm=norm, intermediates_only=True)
        return found.flatten(2).mT, None
    options = {"norm": norm, "output_fmt": "NLC", "intermediates_only": True, "return_prefix_tokens": True}
    (found,) = run(images, indices=[index], **options)
    return found if isinstance(found, tuple) else (found, None)


def attach_head(
    backbone: nn.Module,
    head: str,
    num_classes: int,
    *,
    freeze: bool = True,
    layer: int = -1,
    tokens: Literal["patch", "cls", "both"] = "patch",
    norm: bool = True,
    **kwargs: Any,
) -> Probe:
    """Put a probe on a model.

    Args:
        backbone: a timm model, made with `num_classes=0`.
        head: "linear" or "ep"; see `foveal.layers.pooling`.
        num_classes: outputs.
        freeze, layer, norm: as in `Probe`.
        tokens: "patch", "cls" or "both".
        **kwargs: further arguments of the pooling, such as `queries` of "ep".

    Raises:
        ValueError: an unknown head, or a layer that is not there.
    """
    if head not in POOLINGS:
        raise ValueError(f"head={head!r} must be one of {sorted(POOLINGS)}")
    reference = next(backbone.parameters())
    if hasattr(backbone, "num_prefix_tokens"):
        dim: Any = backbone.num_features
    else:
        dim = backbone.feature_info[layer]["num_chs"]  # pyright: ignore
    made = TokenHead(
        dim, num_classes, pool=head, tokens=tokens, device=reference.device, dtype=reference.dtype, **kwargs
    )
    return Probe(backbone, made, freeze=freeze, layer=layer, norm=norm)


@torch.no_grad()
def predict_by_neighbors(
    query: Tensor, memory: Tensor, labels: Tensor, num_classes: int, *, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Classify by the labels of the nearest features, weighted by exp(cosine / temperature) (arXiv:1805.01978).

    Args:
        query: features `[B, dim]`.
        memory: features of known items `[M, dim]`.
        labels: of those, int64 `[M]`.
        num_classes: classes.
        k: neighbours, M at most.
        temperature: of the weights.

    Returns:
        votes `[B, num_classes]`.
    """
    similarity = F.normalize(query, dim=-1) @ F.normalize(memory, dim=-1).T
    values, places = similarity.topk(min(k, len(memory)), dim=-1)
    weights = ((values - values[:, :1]) / temperature).exp()  # the nearest has weight one
    return weights.new_zeros(len(query), num_classes).scatter_add_(1, labels[places], weights)
