"""Cost of scan attention: FLOPs of the recurrence and compulsory bytes, exact, on Python integers."""

from math import prod
from typing import Any

from torch import Tensor


def forward_flops(
    *, batch: int, tokens: int, heads: int, head_dim: int, value_dim: int, delta: bool = False, passes: int = 1
) -> int:
    """FLOPs of the recurrence: a token writes its outer product and reads one vector, with the delta rule two.

    Args:
        batch, tokens, heads: batch entries, tokens of each, and heads.
        head_dim, value_dim: features of keys and queries, and of values.
        delta: whether there is a beta.
        passes: 2 for both directions.
    """
    return (6 if delta else 4) * batch * tokens * heads * head_dim * value_dim * passes


def backward_flops(**sizes: Any) -> int:
    """FLOPs of the gradients: two products for each of the forward pass; see `forward_flops`."""
    return 2 * forward_flops(**sizes)


def forward_bytes(
    *, batch: int, tokens: int, heads: int, head_dim: int, value_dim: int, itemsize: int, gates: int = 0
) -> int:
    """Bytes that the forward pass must move: operands read once, outputs written once.

    Args:
        batch, tokens, heads, head_dim, value_dim: as in `forward_flops`.
        itemsize: bytes of one element.
        gates: float32 numbers per token and head, such as a log decay and a beta.
    """
    return batch * tokens * heads * (itemsize * 2 * (head_dim + value_dim) + 4 * gates)


def backward_bytes(
    *, batch: int, tokens: int, heads: int, head_dim: int, value_dim: int, itemsize: int, gates: int = 0
) -> int:
    """Bytes that the backward pass must move: operands and the gradient of the output read once, gradients written."""
    return batch * tokens * heads * (itemsize * (4 * head_dim + 3 * value_dim) + 8 * gates)


def sizes_of(query: Tensor, value: Tensor) -> dict[str, int]:
    """Sizes of a call, as the counts here take them."""
    batch, *shape, heads, head_dim = query.shape
    return dict(batch=batch, tokens=prod(shape), heads=heads, head_dim=head_dim, value_dim=value.shape[-1])


def options_of(call: Any) -> dict[str, Any]:
    """Rule and passes of a call, as `forward_flops` takes them."""
    return dict(delta=call.beta is not None, passes=len(call.passes()))


def summarize(query: Tensor, key: Tensor, value: Tensor, call: Any, impl: str | None) -> dict[str, int | float | str]:
    """The cost of one call, by name, for `foveal.kernels.ops.explain`."""
    sizes, options = sizes_of(query, value), options_of(call)
    moved = dict(itemsize=query.itemsize, gates=sum(x is not None for x in (call.log_decay, call.beta)))
    dense = 2 * sizes["batch"] * sizes["heads"] * sizes["tokens"] ** 2 * (sizes["head_dim"] + sizes["value_dim"])
    useful = forward_flops(**sizes, **options)
    return {
        "tokens": sizes["tokens"],
        "direction": call.direction,
        "rule": "additive" if call.beta is None else "delta",
        "dense_over_useful": round(dense / useful, 2) if useful else 0.0,
        "forward_flops": useful,
        "backward_flops": backward_flops(**sizes, **options),
        "forward_bytes": forward_bytes(**sizes, **moved),
        "backward_bytes": backward_bytes(**sizes, **moved),
    }
