"""Window attention against partitioned windows, flex_attention and dense attention."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from foveal.kernels.ops import window_attention
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from ..operators import Operator, Tensors, randn
from ..peers import Attend, block_mask, check_flex, dense_makers, flex


@dataclass(frozen=True)
class Case:
    """Square map with square windows that divide it."""

    source: str
    side: int
    window: int
    heads: int
    shift: int = 0
    bias: bool = True
    head_dim: int = 32
    batch: int = 8
    dtype: torch.dtype = torch.float32
    kernel = "window"

    @property
    def name(self) -> str:
        text = f"{self.side}x{self.side} w{self.window}"
        text += f" shift{self.shift}" if self.shift else ""
        text += " bias" if self.bias else ""
        return f"{text} h{self.heads}x{self.head_dim}" + (f" b{self.batch}" if self.batch != 1 else "")


def cut(x: Tensor, window: int) -> Tensor:
    """`[B, H, W, heads, d]` to `[B, windows, heads, tokens, d]`."""
    x = x.unflatten(1, (-1, window)).unflatten(3, (-1, window))  # [B, H/w, w, W/w, w, heads, d]
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 2)


def join(x: Tensor, side: int, window: int) -> Tensor:
    """The inverse of `cut`."""
    n = side // window
    x = x.unflatten(1, (n, n)).unflatten(4, (window, window))  # [B, H/w, W/w, heads, w, w, d]
    return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)


def shift_mask(case: Case, like: Tensor) -> Tensor:
    """Mask of Swin's shift: -inf between tokens that only the roll made neighbours, `[windows, 1, tokens, tokens]`."""
    part = torch.arange(case.side, device=like.device) >= case.side - case.shift
    region = (2 * part[:, None] + part).view(1, case.side, case.side, 1, 1)
    region = cut(region, case.window)[0, :, 0, :, 0]  # [windows, tokens]
    mask = torch.zeros(len(region), 1, case.window**2, case.window**2, dtype=like.dtype, device=like.device)
    return mask.masked_fill((region[:, None, :] != region[:, :, None])[:, None], float("-inf"))


def partition(case: Case, mask: Tensor | None, fused: bool, query, key, value, bias: Tensor | None = None) -> Tensor:
    """Roll, partition, attend, reverse the partition, roll back, as Swin is usually written."""
    q, k, v = query, key, value
    if case.shift:
        q, k, v = (x.roll((-case.shift, -case.shift), (1, 2)) for x in (q, k, v))
    q, k, v = (cut(x, case.window) for x in (q, k, v))
    added = bias if mask is None else mask if bias is None else bias + mask  # [1 or windows, heads, tokens, tokens]
    if fused:
        if added is not None and added.dim() == 4:
            added = added.repeat(case.batch, 1, 1, 1)
        out = scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v)), attn_mask=added)
        out = out.unflatten(0, q.shape[:2])
    else:
        logits = (q * case.head_dim**-0.5) @ k.transpose(-1, -2)
        out = (logits if added is None else logits + added).softmax(-1) @ v
    out = join(out, case.side, case.window)
    return out.roll((case.shift, case.shift), (1, 2)) if case.shift else out


def places(case: Case, token):
    """Window row and column of a token, whether the roll wrapped it on each axis, and its slot."""
    row, column = token // case.side, token % case.side
    rows, columns = (row - case.shift) % case.side, (column - case.shift) % case.side
    wrapped = (row < case.shift, column < case.shift)
    return (rows // case.window, columns // case.window, *wrapped), rows % case.window * case.window + (
        columns % case.window
    )


def window_mask(case: Case, device: torch.device) -> BlockMask:
    def visible(batch, head, query, key):
        (row, column, over, across), (row_, column_, over_, across_) = places(case, query)[0], places(case, key)[0]
        return (row == row_) & (column == column_) & (over == over_) & (across == across_)

    return block_mask(visible, case.side**2, device)


class Window(Operator):
    name = "window"
    title = "Window attention"
    folder = "window"

    def cases(self, device: torch.device, *, everything: bool = False) -> Iterator[Case]:
        on_cpu = device.type == "cpu"
        case = partial(Case, batch=8) if on_cpu else partial(Case, batch=64, dtype=torch.bfloat16)
        for stage, (side, heads) in enumerate(((56, 3), (28, 6), (14, 12), (7, 24)), 1):
            for shift in (0, 3) if side > 7 else (0,):
                yield case(f"Swin-T stage {stage}", side, 7, heads, shift)
        yield case("Swin v2-T, 256 pixels, stage 1", 64, 8, 3, 4)
        yield case("Swin v2-T, 256 pixels, windows of 16, stage 1", 64, 16, 3, 8)
        yield case("LITv2-S stage 3, Hi-Fi heads", 14, 2, 2, bias=False)

    def scaling(self, device: torch.device) -> list[Case]:
        sides = (64, 128, 256) if device.type == "cpu" else (64, 128, 256, 512)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return [Case("Swin v2-T stage 1, larger", n, 8, 3, batch=1, dtype=dtype) for n in sides]

    def inputs(self, case: Case, device: torch.device) -> Tensors:
        draw = randn(device, case.dtype)
        size = (case.batch, case.side, case.side, case.heads, case.head_dim)
        tensors = {x: draw(*size) for x in ("query", "key", "value")}
        return tensors | ({"bias": draw(case.heads, case.window**2, case.window**2)} if case.bias else {})

    def arguments(self, case: Case) -> dict:
        return {"window": case.window, "shift": case.shift}

    def function(self, case: Case) -> Callable[..., Tensor]:
        return window_attention

    def eager(self, case: Case, device: torch.device, fused: bool = False) -> Attend:
        mask = shift_mask(case, torch.empty(0, dtype=case.dtype, device=device)) if case.shift else None
        return partial(partition, case, mask, fused)

    def crop(self, case: Case) -> Case:
        return replace(case, batch=1, heads=min(case.heads, 2), side=min(case.side, 4 * case.window))

    def peers(self, case: Case, mode: str, device: torch.device) -> dict[str, Callable[[], Attend]]:
        def make_flex() -> Attend:
            check_flex(mode, case.head_dim, device)

            def bias_at(bias: Tensor):
                return lambda score, b, h, q, k: score + bias[h, places(case, q)[1], places(case, k)[1]]

            return flex(window_mask(case, device), bias_at)

        made = {"partition": partial(self.eager, case, device)}
        made |= {"partition SDPA": partial(self.eager, case, device, fused=True), "flex": make_flex}
        return made | dense_makers((case.batch, case.side, case.side, case.heads, case.head_dim), case.dtype, device)
