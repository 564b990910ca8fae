"""ScaleWeaver: image tokens attend to condition tokens, which never attend to the image."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..registry import recipe


@recipe(
    "ScaleWeaver, reference attention",
    "arXiv:2510.14882",
    "partial",
    hosts="visual autoregressive transformers",
    needs="trained LoRA and output projection",
    cost="attention to the condition, whose keys are made once",
    missing="whether image and condition share one softmax (merge= is ours)",
)
def scaleweaver(
    query: Tensor,
    own: tuple[Tensor, Tensor],
    condition: tuple[Tensor, Tensor],
    project: nn.Module,
    *,
    merge: str = "sum",
) -> Tensor:
    """Output of an attention with a condition, `[B, tokens, heads d]`.

    Args:
        query: `[B, heads, tokens, d]`.
        own, condition: keys and values, `[B, heads, keys, d]`.
        project: of the condition's output, zero at the start.
        merge: "sum" of two attentions, or "joint" for one softmax over both, less the own attention, projected.

    Raises:
        ValueError: another merge.
    """
    if merge not in ("sum", "joint"):
        raise ValueError(f"merge={merge!r} must be 'sum' or 'joint'")
    plain = scaled_dot_product_attention(query, *own)
    other = scaled_dot_product_attention(query, *condition)
    if merge == "joint":
        keys, values = (torch.cat(pair, 2) for pair in zip(own, condition, strict=True))
        other = scaled_dot_product_attention(query, keys, values) - plain
    flat = (x.transpose(1, 2).flatten(2) for x in (plain, other))
    plain, other = flat
    return plain + project(other)
