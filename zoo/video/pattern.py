"""Attention patterns of layers: dense, a sliding 3-D window, one axis at a time, or the blocks of a sparse mask.

Functions here take queries `[B, T, H, W, heads, d]` and keys of the same grid, with `past` more frames in front when a
rollout continues. Causal means causal in time and frame by frame: tokens of one frame see each other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels.block_sparse.mask import BlockMask, boxes
from ...kernels.common.calling import is_per_head, per_axis
from ...kernels.masks.named import attend_lists, listed_tokens, named_lists, resolve
from ...kernels.ops import merge_attentions, na3d
from ...layers import BoxGate
from .local_scan import attend_windows, check_local_scan

Attend = Callable[..., Tensor]  # attention of [B, queries, heads, d] to [B, keys, heads, d], with attn_mask
Sizes = tuple[Any, ...]  # an integer for each of t, h, w, or such a tuple for each head
TYPES = ("dense", "window", "spatial", "temporal", "first", "sparse", "local_scan")
OPTIONS = {  # of types that take more than "causal"
    "window": ("causal", "window", "stride", "dilation"),
    "sparse": ("mask", "options", "budget", "flat"),
    "local_scan": ("window", "shift", "options"),
}
GATE = "box_gate"
GATE_CHOICE = ("threshold", "own")  # options of its mask; others are of the layer


@dataclass(frozen=True)
class Text:
    """Words that a video attends to besides its own tokens.

    Attributes:
        key, value: `[B, L, heads, d]`.
        mask: which words count, bool `[B, L]`, of cross-attention also `[B, S, L]`; all when None.
        parts: frames of the queries and the words they see; together all frames, in order. All see all when None.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None
    parts: tuple[tuple[slice, slice], ...] | None = None

    def part(self, words: slice) -> "Text":
        """Some of the words, for all who ask."""
        mask = None if self.mask is None else self.mask[:, words]
        return Text(self.key[:, words], self.value[:, words], mask)


@dataclass(frozen=True)
class Pattern:
    """Attention of one layer, from its entry in the config.

    Attributes:
        type: "dense", "window", "spatial" (each frame by itself), "temporal" (each place by itself), "first" (every
            frame sees the first one alone), "sparse" or "local_scan" (windows of each frame, behind scans of it; see
            `local_scan`).
        causal: whether a frame sees no later frame; nothing to a spatial layer, always of a "first" one.
        window, stride, dilation: of "window", along (t, h, w), or one such tuple per head; see
            `foveal.kernels.ops.na3d`.
        mask: of "sparse", a name in `foveal.kernels.masks`, "package.module:name" of a function
            `(query, key, grid) -> BlockMask`, or "box_gate", a `foveal.layers.BoxGate` that the layer holds.
        options: keyword arguments of the mask; of "box_gate" those of the module, "block" for both of its blocks, and
            "threshold" and "own" of its `mask`.
        budget: share of the keys that a query sees, in (0, 1], for masks that take one. Of "box_gate" share of the
            blocks of keys, besides the own one.
        flat: the mask is given the tokens as one sequence in raster order.
        shift: of "local_scan", how far its windows, of the side window[1], are moved; options are those of its scans.
    """

    type: str = "dense"
    causal: bool = False
    window: Sizes = (1, 1, 1)
    stride: Sizes = (1, 1, 1)
    dilation: Sizes = (1, 1, 1)
    mask: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: float | None = None
    flat: bool = False
    shift: int = 0

    @classmethod
    def from_config(cls, layer: str | Mapping[str, Any]) -> "Pattern":
        """Pattern of an entry of `attention`: a type, or a dict of type and options.

        Raises:
            ValueError: an unknown type, mask or option, or a window, stride, dilation or budget out of range.
        """
        options = {"type": layer} if isinstance(layer, str) else dict(layer)
        kind = options.pop("type", None)
        if kind not in TYPES:
            raise ValueError(f"attention={layer!r} must be one of {TYPES}, or a dict with such a type")
        known = set(OPTIONS.get(kind, ("causal",)))
        if options.keys() - known:
            raise ValueError(f"attention={layer!r} has {sorted(options.keys() - known)}; {kind} takes {sorted(known)}")
        if kind == "sparse":
            return cls._sparse(layer, options)
        if kind == "local_scan":
            window, shift, scans = options.get("window", 8), options.get("shift", 0), options.get("options") or {}
            check_local_scan(layer, window, shift, scans)
            return cls(kind, window=(1, window, window), options=dict(scans), shift=shift)
        causal = options.get("causal", False)
        if not isinstance(causal, bool):
            raise ValueError(f"attention={layer!r}: causal={causal!r} must be true or false")
        if kind != "window":
            return cls(kind, causal or kind == "first")
        if "window" not in options:
            raise ValueError(f"attention={layer!r} needs a window")
        sizes = [_sizes(layer, name, options.get(name, 1)) for name in ("window", "stride", "dilation")]
        if len(counts := {len(x) for x in sizes if is_per_head(x)}) > 1:
            raise ValueError(
                f"attention={layer!r} has entries for {sorted(counts)} heads; expected one number of heads"
            )
        pattern = cls(kind, causal, *sizes)
        for head in pattern.of_heads():
            if any(stride > window for window, stride in zip(head.window, head.stride, strict=True)):
                raise ValueError(f"attention={layer!r}: stride={head.stride} must not exceed window={head.window}")
        return pattern

    @classmethod
    def _sparse(cls, layer: object, options: dict[str, Any]) -> "Pattern":
        mask, budget, flat = options.get("mask"), options.get("budget"), options.get("flat", False)
        keywords = options.get("options") or {}
        if not isinstance(mask, str):
            raise ValueError(
                f"attention={layer!r} needs a mask: a name in foveal.kernels.masks, package.module:name or box_gate"
            )
        if not isinstance(keywords, Mapping) or not isinstance(flat, bool):
            raise ValueError(f"attention={layer!r}: options must be a mapping, flat must be true or false")
        if budget is not None and not 0 < budget <= 1:
            raise ValueError(f"attention={layer!r}: budget={budget!r} must be in (0, 1]")
        pattern = cls("sparse", mask=mask, options=dict(keywords), budget=budget, flat=flat)
        try:
            if mask != GATE:
                resolve(mask, keywords, budget)
            elif budget is not None and "threshold" in keywords:
                raise ValueError("box_gate takes a budget or a threshold")
            else:
                pattern.make_gate(1, 2, device="meta")
        except (ValueError, TypeError, ImportError, AttributeError) as error:
            raise ValueError(f"attention={layer!r}: {error}") from error
        return pattern

    def make_gate(self, heads: int, head_dim: int, **dd: Any) -> BoxGate | None:
        """A gate that chooses the blocks of a layer; None where no gate does."""
        if self.mask != GATE:
            return None
        options = {name: x for name, x in self.options.items() if name not in GATE_CHOICE}
        if "block" in options:
            block = options.pop("block")
            options |= {"query_block": block, "key_block": block}
        return BoxGate(heads, head_dim, **options, **dd)

    @property
    def heads(self) -> int | None:
        """Number of heads of which each has an entry; None where all heads have the same neighborhood."""
        return next((len(x) for x in (self.window, self.stride, self.dilation) if is_per_head(x)), None)

    def of_heads(self) -> list["Pattern"]:
        """The pattern of each head, or the one of all."""
        if self.heads is None:
            return [self]
        sizes = (x if is_per_head(x) else (x,) * self.heads for x in (self.window, self.stride, self.dilation))
        return [Pattern(self.type, self.causal, *of_head) for of_head in zip(*sizes, strict=True)]

    @property
    def remembers(self) -> bool:
        """Return whether a frame attends to other frames, so that a rollout needs their keys."""
        return self.type not in ("spatial", "local_scan")

    def first_needed(self, frames: int) -> int:
        """First frame that any frame from `frames` on can see, down to where stride and dilation groups of all heads
        begin."""
        if self.type != "window":
            return 0
        if self.heads is not None:
            heads = self.of_heads()
            block = math.lcm(*(head.stride[0] * head.dilation[0] for head in heads))
            return min(head.first_needed(frames) for head in heads) // block * block
        window, stride, dilation = self.window[0], self.stride[0], self.dilation[0]
        first = frames // dilation // stride * stride + stride - window  # position, in its dilation group
        return max(first, 0) // stride * stride * dilation

    def fit(self, grid: tuple[int, int, int]) -> tuple[dict[str, Any], int]:
        """Arguments of `na3d` for a grid, and the empty frames it needs at the end.

        An axis shorter than the window is seen whole, and dilation gives way to the window. Causal time differs: there
        the rule is that of a video without end, or frames would depend on how many come after them. Empty frames
        complete the last stride and dilation group; nothing sees them.
        """
        if self.type == "temporal":
            return {"window": (grid[0], 1, 1), "causal": (self.causal, False, False)}, 0
        if self.type == "spatial":
            return {"window": (1, *grid[1:])}, 0
        if self.heads is not None:
            fits = [head.fit(grid) for head in self.of_heads()]
            names = ("window", "stride", "dilation")
            options = {name: tuple(head[name] for head, _ in fits) for name in names}
            return options | {"causal": fits[0][0]["causal"]}, max(padding for _, padding in fits)
        window = [min(w, n) for w, n in zip(self.window, grid, strict=True)]
        dilation = [min(d, n // w) for d, n, w in zip(self.dilation, grid, window, strict=True)]
        padding = 0
        if self.causal:
            dilation[0] = self.dilation[0]
            positions = -(-grid[0] // dilation[0])
            positions = -(-positions // self.stride[0]) * self.stride[0]
            window[0] = min(self.window[0], positions)
            padding = positions * dilation[0] - grid[0]
        stride = [min(s, w) for s, w in zip(self.stride, window, strict=True)]
        causal = (self.causal, False, False)
        options = {"window": tuple(window), "stride": tuple(stride), "dilation": tuple(dilation), "causal": causal}
        return options, padding


def _sizes(layer: object, name: str, value: Any) -> Sizes:
    if is_per_head(value):
        return tuple(_per_axis(layer, f"{name}[{head}]", entry) for head, entry in enumerate(value))
    return _per_axis(layer, name, value)


def _per_axis(layer: object, name: str, value: Any) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * 3
    if len(values) != 3 or not all(type(x) is int and x >= 1 for x in values):
        raise ValueError(
            f"attention={layer!r}: {name}={value!r} must be one integer from 1 on, or one for each of t, h, w"
        )
    return values


def attend(
    pattern: Pattern,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text: Text | None,
    dense: Attend,
    qk_dtype: torch.dtype | None = None,
    gate: BoxGate | None = None,
) -> Tensor:
    """Attention of a layer: `[B, T, H, W, heads, d]`.

    Args:
        pattern: what the queries see.
        query: `[B, T, H, W, heads, d]`.
        key, value: `[B, past + T, H, W, heads, d]`; past = 0 for spatial layers.
        text: what the queries see besides.
        dense: what computes attention without a pattern.
        qk_dtype: what queries and keys of windows are rounded to; see `foveal.kernels.ops.na3d`.
        gate: of `Pattern.make_gate`.
    """
    if pattern.type == "local_scan":
        return attend_windows(query, key, value, pattern.window[1], pattern.shift)
    if pattern.type == "sparse":
        return _sparse(pattern, query, key, value, text, gate)
    if pattern.type == "first":
        return _first(query, key, value, text, dense)
    if pattern.type == "window" or (text is not None and pattern.type != "dense"):
        return _window(pattern, query, key, value, text, qk_dtype)
    if pattern.type == "spatial":
        q, k, v = (x.flatten(2, 3).flatten(0, 1) for x in (query, key, value))
        return dense(q, k, v).unflatten(1, query.shape[2:4]).unflatten(0, query.shape[:2])
    if pattern.type == "temporal":
        # places join the batch: [B * H * W, frames, 1 token, heads, d]
        q, k, v = (x.movedim(1, 3).flatten(0, 2).unsqueeze(2) for x in (query, key, value))
        out = _frames(pattern.causal, q, k, v, None, dense)
        return out.unflatten(0, (query.shape[0], *query.shape[2:4])).movedim(3, 1)
    q, k, v = (x.flatten(2, 3) for x in (query, key, value))
    if text is None or text.parts is None:
        return _frames(pattern.causal, q, k, v, text, dense).unflatten(1, query.shape[1:4])
    outs, past = [], key.shape[1] - query.shape[1]
    for frames, words in text.parts:
        seen = slice(0, past + frames.stop) if pattern.causal else slice(None)
        outs.append(_frames(pattern.causal, q[:, frames], k[:, seen], v[:, seen], text.part(words), dense))
    return torch.cat(outs, dim=1).unflatten(1, query.shape[1:4])


def _first(query: Tensor, key: Tensor, value: Tensor, text: Text | None, dense: Attend) -> Tensor:
    """Attention of every frame to the first frame of the video, and to a text (Puppet-Master, all-to-first)."""
    parts = [(slice(None), text)] if text is None or text.parts is None else [(f, text.part(w)) for f, w in text.parts]
    key, value, outs = key[:, 0].flatten(1, 2), value[:, 0].flatten(1, 2), []
    for frames, words in parts:
        k, v, mask = key, value, None
        if words is not None:
            mask = key_mask(words, key.shape[1])
            k, v = torch.cat([words.key, key], dim=1), torch.cat([words.value, value], dim=1)
        outs.append(dense(query[:, frames].flatten(1, 3), k, v, attn_mask=mask))
    return torch.cat(outs, dim=1).unflatten(1, query.shape[1:4])


def _frames(causal: bool, query: Tensor, key: Tensor, value: Tensor, text: Text | None, dense: Attend) -> Tensor:
    """Attention of `[B, T, tokens of a frame, heads, d]` to all frames or to none that is later, `[B, T * tokens, ..]`.

    A causal call goes frame by frame: no mask over all pairs is made, and backends without masks can do it.
    """
    frames, tokens = query.shape[1:3]
    past = key.shape[1] - frames

    def joined(video: Tensor, words: Tensor | None) -> Tensor:
        flat = video.flatten(1, 2)
        return flat if words is None else torch.cat([words, flat], dim=1)

    text_key, text_value = (None, None) if text is None else (text.key, text.value)
    if not causal:
        mask = key_mask(text, key.shape[1] * tokens)
        return dense(query.flatten(1, 2), joined(key, text_key), joined(value, text_value), attn_mask=mask)
    if text is None and tokens == 1 and past == 0:
        return dense(query.flatten(1, 2), joined(key, None), joined(value, None), is_causal=True)
    outs = []
    for i in range(frames):
        seen = slice(0, past + i + 1)
        mask = key_mask(text, (past + i + 1) * tokens)
        outs.append(
            dense(query[:, i], joined(key[:, seen], text_key), joined(value[:, seen], text_value), attn_mask=mask)
        )
    return torch.cat(outs, dim=1)


def key_mask(text: Text | None, video_tokens: int) -> Tensor | None:
    """Mask of visible keys, text tokens first: bool `[B, 1, 1, L + video_tokens]`, None for all."""
    if text is None or text.mask is None:
        return None
    return torch.nn.functional.pad(text.mask, (0, video_tokens), value=True)[:, None, None]


def _window(
    pattern: Pattern, query: Tensor, key: Tensor, value: Tensor, text: Text | None, qk_dtype: torch.dtype | None
) -> Tensor:
    past = key.shape[1] - query.shape[1]
    options, padding = pattern.fit((key.shape[1], *key.shape[2:4]))
    options["qk_dtype"] = qk_dtype
    queries = query
    if past or padding:
        # na3d wants queries for every frame: those of the past are zeros, and what they see is thrown away
        queries = _pad_frames(query, past, padding)
        key, value = _pad_frames(key, 0, padding), _pad_frames(value, 0, padding)
    mine = slice(past, past + query.shape[1])
    if text is not None and text.parts is not None:
        video = (x[:, mine] for x in na3d(queries, key, value, **options, return_lse=True))
        return merge_attentions(*zip(video, _words(query, text), strict=True))[0]
    return na3d(queries, key, value, **options, **_additional(text))[:, mine]


def _sparse(
    pattern: Pattern, query: Tensor, key: Tensor, value: Tensor, text: Text | None, gate: BoxGate | None
) -> Tensor:
    # a choice has no gradient: without its history, ranking and counting blocks cost nothing in the backward pass
    q, k = query.detach(), key.detach()
    if gate is None:
        lists = named_lists(q, k, pattern.mask, pattern.options, pattern.budget, flat=pattern.flat)
    else:
        lists = _gated_lists(pattern, gate, *((x.flatten(1, 3) for x in (q, k)) if pattern.flat else (q, k)))
    tokens = listed_tokens(pattern.mask, pattern.options)
    if text is not None and text.parts is not None:
        video = attend_lists(query, key, value, mask=lists, tokens=tokens, return_lse=True)
        return merge_attentions(*zip(video, _words(query, text), strict=True))[0]
    return attend_lists(query, key, value, mask=lists, tokens=tokens, **_additional(text))


def _gated_lists(pattern: Pattern, gate: BoxGate, query: Tensor, key: Tensor) -> BlockMask:
    options = {name: x for name, x in pattern.options.items() if name in GATE_CHOICE}
    if pattern.budget is not None:
        shape = key.shape[1:-2]
        blocks = math.prod(boxes(shape, per_axis("key_block", gate.key_block, len(shape), int)))
        options["topk"] = max(1, math.ceil(pattern.budget * blocks))
    return gate.choose(query, key, **options)


def _additional(text: Text | None) -> dict[str, Tensor | None]:
    """Arguments of the operators for a text that every query sees."""
    if text is None:
        return {}
    return {"additional_keys": text.key, "additional_values": text.value, "additional_mask": text.mask}


def _pad_frames(x: Tensor, before: int, after: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0) * 4 + (before, after))


def _words(query: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    """Attention `[B, T, H, W, heads, d]` to the words that count and its log-sum-exp, tiny where none does."""
    accumulate = torch.promote_types(query.dtype, torch.float32)
    outs, lses = [], []
    assert text.parts is not None
    for frames, words in text.parts:
        some = text.part(words)
        q = query[:, frames].to(accumulate) * query.shape[-1] ** -0.5
        logits = torch.einsum("bthwnd,blnd->bthwnl", q, some.key.to(accumulate))
        if some.mask is not None:
            hidden = torch.finfo(accumulate).min / 2  # finite: without any word -inf would make NaN
            logits = logits.masked_fill(~some.mask[:, None, None, None, None], hidden)
        outs.append(torch.einsum("bthwnl,blnd->bthwnd", logits.softmax(-1), some.value.to(accumulate)).to(query.dtype))
        lses.append(logits.logsumexp(-1))
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)
