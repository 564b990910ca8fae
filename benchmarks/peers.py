"""Alternatives to the operators: dense attention, flex_attention, NATTEN.

Each maker returns a function of query, key and value `[B, *spatial, heads, head_dim]`, and of the bias of a benchmark
that has one. The function returns the output in the same layout.
"""

from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from .benchmark import SkippedError

Attend = Callable[..., Tensor]
BACKENDS = {
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
    "cuda": (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ),
}
MOST_LOGITS = {"cpu": 512 << 20, "cuda": 8 << 30}  # bytes of logits that attention may hold in memory
MOST_TOKENS = 20_000  # that dense attention takes on a CPU


def heads_first(x: Tensor) -> Tensor:
    return x.flatten(1, -3).transpose(1, 2)


def heads_last(x: Tensor, like: Tensor) -> Tensor:
    return x.transpose(1, 2).unflatten(1, like.shape[1:-2])


def refuse_logits(count: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise SkippedError if the logits are too large to be held in memory."""
    if count * dtype.itemsize > MOST_LOGITS[device.type]:
        raise SkippedError(f"would write out {count * dtype.itemsize / 2**30:.0f} GiB of logits")


def dense(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, **_: Tensor) -> Tensor:
    """Dense attention without mask or bias."""
    q, k, v = map(heads_first, (query, key, value))
    with sdpa_kernel(backend):
        return heads_last(scaled_dot_product_attention(q, k, v), query)


def dense_makers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Attend]]:
    """Dense attention by each backend of the device, for a query of this shape."""
    batch, heads, tokens = shape[0], shape[-2], prod(shape[1:-2])

    def make(backend: SDPBackend) -> Attend:
        if device.type == "cpu" and tokens > MOST_TOKENS:
            raise SkippedError("quadratic: minutes a call")
        if backend == SDPBackend.MATH:
            refuse_logits(batch * heads * tokens**2, dtype, device)
        return partial(dense, backend)

    return {f"dense {b.name.split('_')[0].lower()}": partial(make, b) for b in BACKENDS[device.type]}


def compiled(function: Attend) -> Attend:
    return torch.compile(function, fullgraph=True, dynamic=False)


def block_mask(visible: Callable, tokens: int, device: torch.device) -> BlockMask:
    """Block mask of `visible(batch, head, query, key)`; on GPUs it is made without the dense mask in memory."""
    make = torch.compile(create_block_mask, dynamic=False) if device.type == "cuda" else create_block_mask
    return make(visible, None, None, tokens, tokens, device=device)


def flex(mask: BlockMask, bias_at: Callable[[Tensor], Callable] | None = None) -> Attend:
    """Compiled flex_attention.

    Args:
        mask: block mask of the visible keys.
        bias_at: makes the `score_mod` that adds a bias.
    """

    @compiled
    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        score = None if bias is None or bias_at is None else bias_at(bias)
        return flex_attention(query, key, value, score_mod=score, block_mask=mask)

    def in_our_layout(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        # outside the compiled function, because inductor's CPU lowering takes no views of more axes
        return heads_last(attend(*map(heads_first, (query, key, value)), bias), query)

    return in_our_layout


def check_flex(mode: str, head_dim: int, device: torch.device) -> None:
    """Raise SkippedError where flex_attention cannot run."""
    if device.type == "cpu" and mode != "forward":
        raise SkippedError("flex_attention has no backward on CPU")
    if head_dim < 16:
        raise SkippedError("flex_attention needs a head_dim of 16 or more")
