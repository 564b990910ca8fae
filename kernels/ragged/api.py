"""Public attention on ragged batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .groups import attend_groups
from .layout import Group, RaggedLayout, take_members

Sizes = RaggedLayout | Sequence[int | Sequence[int]] | Tensor
Tokens = Tensor | Sequence[Tensor]
OF_ENTRIES = ("additional_keys", "additional_values", "additional_mask")  # arguments with a batch axis


class _Packed(NamedTuple):
    """Packed tokens `[tokens, heads, d]`, their layout, and how results take the form of the argument again."""

    tokens: Tensor
    layout: RaggedLayout
    restore: Callable[[Tensor], Any]


def _split(x: Tensor, layout: RaggedLayout) -> list[Tensor]:
    pieces = x.split([prod(size) for size in layout.sizes])
    return [piece.unflatten(0, size) for piece, size in zip(pieces, layout.sizes, strict=True)]


def _pack(name: str, x: Tokens, layout: RaggedLayout | None) -> _Packed:
    """`x` packed, whichever of the accepted forms it has."""
    if isinstance(x, Tensor) and x.is_nested and x.layout == torch.jagged:
        return _pack_jagged(name, x, layout)
    if isinstance(x, Tensor) and not x.is_nested:
        if layout is None:
            raise ValueError(f"sizes must be given, since {name} is a packed tensor")
        if x.dim() != 3 or x.shape[0] != layout.tokens:
            raise ValueError(
                f"{name}.shape={tuple(x.shape)} must be [tokens, heads, head_dim] with the {layout.tokens} tokens of "
                f"its {len(layout)} entries"
            )
        return _Packed(x, layout, lambda found: found)
    nested = isinstance(x, Tensor)
    entries = list(x.unbind()) if isinstance(x, Tensor) else x
    if not isinstance(entries, Sequence) or not entries or not all(isinstance(t, Tensor) for t in entries):
        raise TypeError(f"{name} must be a packed or nested tensor, or a list of tensors [*size, heads, head_dim]")
    found = RaggedLayout([t.shape[:-2] for t in entries])
    if layout is not None and layout != found:
        raise ValueError(f"sizes={list(layout.sizes)} must be those of {name}, {list(found.sizes)}")

    def restore(result: Tensor) -> Any:
        pieces = _split(result, found)
        return torch.nested.as_nested_tensor(pieces, layout=torch.strided) if nested else pieces

    return _Packed(torch.cat([t.flatten(0, -3) for t in entries]), found, restore)


def _pack_jagged(name: str, x: Tensor, layout: RaggedLayout | None) -> _Packed:
    values, offsets = x.values(), x.offsets()  # pyright: ignore[reportAttributeAccessIssue]
    if values.dim() != 3:
        raise ValueError(f"{name}.shape={tuple(x.shape)} must be [B, tokens, heads, head_dim] with ragged tokens")
    ends = offsets.tolist()
    lengths = [after - before for before, after in pairwise(ends)]
    layout = layout or RaggedLayout(lengths)
    if [prod(size) for size in layout.sizes] != lengths or values.shape[0] != layout.tokens:
        raise ValueError(f"sizes={list(layout.sizes)} must hold the tokens of {name}, which are {lengths}")
    return _Packed(values, layout, lambda found: torch.nested.nested_tensor_from_jagged(found, offsets))


def ragged_attention(
    operator: Callable[..., Any],
    query: Tokens,
    key: Tokens,
    value: Tokens,
    *,
    sizes: Sizes | None = None,
    key_sizes: Sizes | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """An attention operator on entries with grids of different sizes: no entry sees another, nothing is padded.

    Entries of one size are attended as one batch, so a call costs as many launches as there are different sizes, and a
    gather of the tokens unless equal sizes lie next to each other. Differentiable as the operator is.

    Args:
        operator: `na1d`, `na2d`, `na3d`, `window_attention`, `block_sparse_attention`, or another function of query,
            key and value on grids `[B, *spatial, heads, head_dim]`.
        query: in one of these forms, which the results take, too: tokens of all entries one after the other,
            `[tokens, heads, head_dim]`, in C order of each grid; a nested tensor of layout torch.jagged,
            `[B, tokens, heads, head_dim]`; a list or a nested tensor of layout torch.strided with one grid
            `[*size, heads, head_dim]` an entry.
        key, value: likewise; key_heads as the operator takes them.
        sizes: grid of each entry, see `RaggedLayout`; make a `RaggedLayout` where several calls have the same. Needed
            for packed tokens, and for torch.jagged on more than one axis.
        key_sizes: grid of each entry's keys, where it differs (block-sparse attention); `sizes` when None.
        return_lse: also return the log-sum-exp.
        **options: arguments of the operator. Those with a batch axis (`additional_keys`, `additional_values`,
            `additional_mask`) have one row an entry. An option that depends on the size is a function of the query and
            key of a group, `[entries, *size, heads, head_dim]`: `mask=lambda query, key: …`, or a window cut to small
            grids.

    Returns:
        output in the form of query; with `return_lse` a tuple of it and the log-sum-exp `[tokens, heads]` in that form.

    Raises:
        ValueError, TypeError: forms or sizes that do not fit; the message names them. Errors of the operator name its
            own arguments.
    """
    if not callable(operator):
        raise TypeError(f"operator={operator!r} must be an attention operator, such as na2d")
    layout = None if sizes is None else RaggedLayout.of(sizes)
    key_layout = layout if key_sizes is None else RaggedLayout.of(key_sizes)
    packed = _pack("query", query, layout)
    keys, values = _pack("key", key, key_layout), _pack("value", value, key_layout)
    if values.layout != keys.layout:
        raise ValueError(f"sizes of value {list(values.layout.sizes)} must be those of key {list(keys.layout.sizes)}")
    for name in OF_ENTRIES:
        x = options.get(name)
        if isinstance(x, Tensor) and x.shape[:1] != (len(packed.layout),):
            raise ValueError(f"{name}.shape={tuple(x.shape)} must have one row for each entry")

    def attend(group: Group, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        given = options_of(group, options, *tensors[:2])
        if return_lse:
            return operator(*tensors, **given, return_lse=True)
        return operator(*tensors, **given), None

    out, lse = attend_groups(attend, packed.tokens, keys.tokens, values.tokens, packed.layout, keys.layout)
    return (packed.restore(out), packed.restore(lse)) if return_lse else packed.restore(out)


def options_of(group: Group, options: Mapping[str, Any], query: Tensor, key: Tensor) -> dict[str, Any]:
    """Options of an operator as the entries of a group have them."""
    given = {}
    for name, option in options.items():
        if name in OF_ENTRIES and isinstance(option, Tensor):
            option = take_members(option, group.members)
        given[name] = option(query, key) if callable(option) else option
    return given
