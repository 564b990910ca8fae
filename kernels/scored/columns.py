"""Masks by columns: per key, intervals of queries that do not see it, in memory that grows with the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

FAR = torch.iinfo(torch.int32).max


@dataclass(frozen=True, eq=False)
class ColumnMask:
    """Visibility as intervals of rows per column, as in FlashMask (arXiv:2410.01359, section 4).

    A query at row position r does not see key j where `start[…, j] <= r < end[…, j]` in any of the intervals of the
    key. Any mask whose columns are few intervals fits: causal, documents, windows, prefixes, rings.

    Args:
        start, end: first masked row position and the one behind the last, integers `[B or 1, heads or 1, keys]`, or
            with a last axis for several intervals per key. An empty interval masks nothing.
        start2, end2: a second interval per key, in the same shape.
        rows: position of each query, integers `[queries]`; their index when None. With it, intervals are of document
            numbers, frames or rings instead of indices.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """

    start: Tensor
    end: Tensor
    start2: Tensor | None = None
    end2: Tensor | None = None
    rows: Tensor | None = None

    def __post_init__(self):
        for name in ("start", "end", "start2", "end2", "rows"):
            x = getattr(self, name)
            if x is None and name in ("start2", "end2", "rows"):
                continue
            if not isinstance(x, Tensor) or x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
                given = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{name} must be an integer tensor, got {given}")
        if self.start.dim() not in (3, 4) or self.start.shape != self.end.shape:
            shapes = f"{tuple(self.start.shape)} and {tuple(self.end.shape)}"
            raise ValueError(f"start and end of shapes {shapes} must both be [B or 1, heads or 1, keys(, intervals)]")
        if (self.start2 is None) != (self.end2 is None):
            raise ValueError("start2 and end2 must be given together")
        for name, x in (("start2", self.start2), ("end2", self.end2)):
            if x is not None and x.shape != self.start.shape:
                raise ValueError(f"{name}.shape={tuple(x.shape)} must equal start.shape={tuple(self.start.shape)}")
        if self.rows is not None and self.rows.dim() != 1:
            raise ValueError(f"rows.shape={tuple(self.rows.shape)} must be [queries]")

    @property
    def num_keys(self) -> int:
        """Number of columns."""
        return self.start.shape[2]

    def intervals(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of start and end, `[B or 1, heads or 1, keys]` each."""
        pairs = [(self.start, self.end)]
        if self.start2 is not None and self.end2 is not None:
            pairs.append((self.start2, self.end2))
        if self.start.dim() == 3:
            return pairs
        return [(s[..., i], e[..., i]) for s, e in pairs for i in range(s.shape[-1])]

    def positions(self, queries: int) -> Tensor:
        """Row position of each query, `[queries]`.

        Raises:
            ValueError: another number of queries than `rows` is for.
        """
        if self.rows is None:
            return torch.arange(queries, device=self.start.device)
        if self.rows.shape[0] != queries:
            raise ValueError(
                f"mask.rows has {self.rows.shape[0]} positions; expected one for each of {queries} queries"
            )
        return self.rows

    def visible(self, queries: int, first: int = 0, last: int | None = None) -> Tensor:
        """Visibility of all keys to queries `first` to `last`, bool `[B or 1, heads or 1, last - first, keys]`."""
        rows = self.positions(queries)[first:last, None]
        hidden = [(rows >= s[:, :, None]) & (rows < e[:, :, None]) for s, e in self.intervals()]
        return ~torch.stack(hidden).any(0)

    def tiles(self, queries: int, query_block: int, key_block: int) -> Tensor:
        """State of each tile from the extremes of its columns alone, as a kernel decides it.

        Args:
            queries: number of queries.
            query_block, key_block: tokens of a tile.

        Returns:
            int8 `[B or 1, heads or 1, query tiles, key tiles]`: 0 nothing is visible (skip it), 2 everything is (no
            mask needed), 1 the mask has to be looked at.
        """
        rows = self.positions(queries)
        chunks = rows.split(query_block)
        low = torch.stack([c.min() for c in chunks])[:, None]  # [query tiles, 1]
        high = torch.stack([c.max() for c in chunks])[:, None]
        empty, full = None, None
        for start, end in self.intervals():
            s, e = start.split(key_block, dim=-1), end.split(key_block, dim=-1)
            s_max, s_min = (torch.stack([f(x) for x in s], -1)[:, :, None] for f in (_max, _min))
            e_min, e_max = (torch.stack([f(x) for x in e], -1)[:, :, None] for f in (_min, _max))
            covers = (s_max <= low) & (high < e_min)
            void = torch.stack([(a >= b).all(-1) for a, b in zip(s, e, strict=True)], -1)[:, :, None]
            clear = (high < s_min) | (low >= e_max) | void
            empty = covers if empty is None else empty | covers
            full = clear if full is None else full & clear
        assert empty is not None and full is not None
        return torch.where(empty, 0, torch.where(full, 2, 1)).to(torch.int8)

    # constructors

    @classmethod
    def causal(cls, positions: Tensor | int, *, ties: bool = True) -> ColumnMask:
        """A query sees the keys whose position is not above its own.

        Args:
            positions: integers `[tokens]` in any order, or the number of tokens for their index.
            ties: whether tokens of equal position see one another; a token always sees itself only with ties.
        """
        at = torch.arange(positions) if isinstance(positions, int) else positions.long()
        end = at if ties else at + 1
        return cls(torch.full_like(at, -FAR)[None, None], end[None, None], rows=at)

    @classmethod
    def documents(cls, lengths: Sequence[int], *, device: torch.device | str | None = None) -> ColumnMask:
        """Tokens of several documents in one sequence see those of their own document only."""
        if not lengths or any(n < 1 for n in lengths):
            raise ValueError(f"lengths={list(lengths)} must hold the positive numbers of tokens of the documents")
        number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(list(lengths))).to(device)
        return cls.band(number, before=0, after=0)

    @classmethod
    def band(cls, positions: Tensor, *, before: int, after: int, always: Tensor | None = None) -> ColumnMask:
        """A query at position r sees keys at positions r - before to r + after.

        Args:
            positions: integers `[tokens]`: indices, numbers of frames or of documents.
            before, after: reach, in positions.
            always: bool `[tokens]`, keys that every query sees.
        """
        at = positions.long()
        none = torch.zeros_like(at) if always is None else always.to(at)
        start = torch.stack([torch.full_like(at, -FAR), at + before + 1], -1)
        end = torch.stack([torch.where(none.bool(), -FAR, at - after), torch.full_like(at, FAR)], -1)
        start[..., 1] = torch.where(none.bool(), FAR, start[..., 1])
        return cls(start[None, None], end[None, None], rows=at)

    @classmethod
    def shared_prefix(cls, prefix: int, lengths: Sequence[int]) -> ColumnMask:
        """Documents after a prefix of so many tokens, which all of them see; the prefix sees itself alone."""
        if prefix < 0:
            raise ValueError(f"prefix={prefix} must not be negative")
        mask = cls.documents([prefix, *lengths] if prefix else lengths)
        assert mask.rows is not None
        return cls.band(mask.rows, before=0, after=0, always=mask.rows == 0) if prefix else mask

    @classmethod
    def frames(cls, num_frames: int, tokens: int, *, window: int, key_frames: Sequence[int] = ()) -> ColumnMask:
        """Tokens of a video see frames within `window` of their own, and the key frames.

        Args:
            num_frames, tokens: frames, and tokens of each.
            window: reach in frames, on both sides.
            key_frames: frames that every token sees.

        Raises:
            ValueError: a key frame that is not there.
        """
        if any(not 0 <= f < num_frames for f in key_frames):
            raise ValueError(f"key_frames={list(key_frames)} must lie in [0, num_frames={num_frames})")
        at = torch.arange(num_frames).repeat_interleave(tokens)
        always = torch.isin(at, torch.tensor(list(key_frames), dtype=torch.long))
        return cls.band(at, before=window, after=window, always=always)

    @classmethod
    def concentric(cls, shape: Sequence[int], *, text: int = 0) -> ColumnMask:
        """Rings of an image or a clip: a token sees its own ring and those around it (arXiv:2410.15926).

        Args:
            shape: tokens along each axis.
            text: tokens after those of the grid, causal among themselves, which see the whole grid.
        """
        rings = ring_positions(shape).flatten()
        after = torch.arange(text) + int(rings.max()) + 1
        return cls.causal(torch.cat([rings, after]))

    @classmethod
    def scenes(cls, texts: Sequence[int], videos: Sequence[int]) -> ColumnMask:
        """Scenes of one video with a text each (Mask2DiT, arXiv:2503.19881).

        Tokens come as all texts, then all clips. Text i sees text i and clip i; a clip sees its text and all clips.

        Args:
            texts, videos: numbers of tokens of each scene's text and clip.

        Raises:
            ValueError: another number of texts than of clips.
        """
        if len(texts) != len(videos) or not texts:
            raise ValueError(f"texts={list(texts)} and videos={list(videos)} must hold as many lengths, one a scene")
        n = len(texts)
        counts = torch.tensor([*texts, *videos])
        at = torch.arange(2 * n).repeat_interleave(counts)  # texts 0 to n - 1, clips n to 2 n - 1
        is_text, scene = at < n, at % n
        low, top = torch.full_like(at, -FAR), torch.full_like(at, FAR)
        # hidden from: scenes before, scenes after up to the own clip or the first one, and for texts later clips
        start = torch.stack([low, scene + 1, torch.where(is_text, n + scene + 1, top)], -1)
        end = torch.stack([scene, torch.where(is_text, n + scene, n), torch.where(is_text, top, low)], -1)
        return cls(start[None, None], end[None, None], rows=at)


def _max(x: Tensor) -> Tensor:
    return x.amax(-1)


def _min(x: Tensor) -> Tensor:
    return x.amin(-1)


def ring_positions(shape: Sequence[int]) -> Tensor:
    """Distance of each token of a grid from the nearest border: 0 at the border, most in the middle; int64."""
    found = None
    for axis, n in enumerate(shape):
        if n < 1:
            raise ValueError(f"shape={tuple(shape)} must hold positive lengths")
        at = torch.arange(n)
        near = torch.minimum(at, n - 1 - at).view(-1, *(1,) * (len(shape) - 1 - axis))
        found = near if found is None else torch.minimum(found, near)
    if found is None:
        raise ValueError("shape=() must have an axis")
    return found


register_dataclass(ColumnMask)
