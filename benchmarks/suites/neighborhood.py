"""Neighborhood attention against dense attention, flex_attention, gathered windows and NATTEN."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import prod

import torch
from foveal.kernels.neighborhood import geometry, make_axes
from foveal.kernels.ops import na1d, na2d, na3d
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..benchmark import SkippedError
from ..operators import MOST_REFERENCE_LOGITS, Operator, Tensors, randn
from ..peers import Attend, block_mask, check_flex, compiled, dense_makers, flex, heads_first, heads_last

OPERATORS = {1: na1d, 2: na2d, 3: na3d}
MOST_CROPPED = 10_000  # tokens of a crop; its windows may be halved
GATHERED = {"cpu": 2 << 30, "cuda": 6 << 30}  # bytes of keys and values that `unfold` may gather


@dataclass(frozen=True)
class Case:
    source: str
    shape: tuple[int, ...]
    window: int | tuple[int, ...] = 7
    stride: int | tuple[int, ...] = 1
    dilation: int = 1
    heads: int = 2
    head_dim: int = 32
    batch: int = 1
    dtype: torch.dtype = torch.float32
    kernel = "neighborhood"

    @property
    def name(self) -> str:
        text = f"{'x'.join(map(str, self.shape))} w{self.window} h{self.heads}x{self.head_dim}"
        text += f" s{self.stride}" if self.stride != 1 else ""
        text += f" d{self.dilation}" if self.dilation != 1 else ""
        text += f" b{self.batch}" if self.batch != 1 else ""
        return text.replace(", ", ".").replace("(", "").replace(")", "")

    @property
    def axes(self) -> tuple[geometry.Axis, ...]:
        return make_axes(self.shape, window=self.window, stride=self.stride, dilation=self.dilation)


def stages(batch: int, dtype: torch.dtype) -> Iterator[Case]:
    """Stages of DiNAT-M at 224x224."""
    for stage, (side, heads, dilation) in enumerate(((56, 2, 8), (28, 4, 4), (14, 8, 2), (7, 16, 1)), 1):
        for d in sorted({1, dilation}):
            yield Case(f"DiNAT-M stage {stage}", (side, side), heads=heads, dilation=d, batch=batch, dtype=dtype)


def unfold(keys_of: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Gather the keys of each query, `keys_of` `[tokens, keys]`, as implementations with `unfold` do."""
    q, k, v = (x.flatten(1, -3) for x in (query, key, value))
    logits = torch.einsum("bthd,btkhd->bthk", q * q.shape[-1] ** -0.5, k[:, keys_of])
    return torch.einsum("bthk,btkhd->bthd", logits.softmax(-1), v[:, keys_of]).view(query.shape)


def keys_of_queries(case: Case, device: torch.device) -> Tensor:
    """Visible keys per query, `[tokens, keys]`; without causal axes each query has the same number."""
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for axis in case.axes:
        first, _ = geometry.axis_bounds(axis, device)
        keys = first[:, None] + torch.arange(axis.window, device=device) * axis.dilation  # [length, window]
        index = (index[:, None, :, None] * axis.length + keys[None, :, None, :]).flatten(2).flatten(0, 1)
    return index


def window_mask(case: Case, device: torch.device) -> BlockMask:
    """Window as a block mask of flex_attention, by arithmetic only: on CPU flex takes no mask that reads tensors."""

    def visible(batch, head, query, key):
        seen = query >= 0
        for axis in reversed(case.axes):
            length, dilation = axis.length, axis.dilation
            i, j = query % length, key % length
            query, key = query // length, key // length
            n = length if dilation == 1 else geometry.group_length(length, dilation, i % dilation)
            lo, hi = geometry.window_bounds(i // dilation, n, axis.window, axis.stride, axis.causal)
            seen = seen & (j % dilation == i % dilation) & (j // dilation >= lo) & (j // dilation < hi)
        return seen

    return block_mask(visible, prod(case.shape), device)


class Neighborhood(Operator):
    name = "neighborhood"
    title = "Neighborhood attention"
    folder = "neighborhood"

    def cases(self, device: torch.device, *, everything: bool = False) -> Iterator[Case]:
        if device.type == "cpu":
            yield from stages(1, torch.float32)
            yield Case("DiNAT-M stage 1 at 448", (112, 112))
            yield Case("VideoDiT-B, a short clip", (8, 16, 16), (3, 8, 8), heads=12, head_dim=64)
            return
        half = partial(Case, head_dim=128, dtype=torch.bfloat16)
        yield from stages(64, torch.bfloat16)
        for stride in (1, 16):
            yield half("FLUX, 4096x4096 pixels", (256, 256), 80, stride, heads=24)
        for stride in (1, (16, 8, 8)):
            yield half("HunyuanVideo, 720p", (30, 48, 80), (18, 24, 24), stride, heads=24)
        for stride in (1, (1, 16, 16)):
            yield half("Cosmos 7B, 720p", (16, 44, 80), (16, 32, 48), stride, heads=32)
        for stride in (1, (2, 8, 8)):
            yield half("Wan 1.3B, 480p", (21, 30, 52), (6, 16, 16), stride, heads=12)

    def scaling(self, device: torch.device) -> list[Case]:
        sides = (64, 128, 256) if device.type == "cpu" else (64, 128, 256, 512)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return [Case("DiNAT-M stage 1, larger", (side, side), dtype=dtype) for side in sides]

    def inputs(self, case: Case, device: torch.device) -> Tensors:
        draw = randn(device, case.dtype)
        return {x: draw(case.batch, *case.shape, case.heads, case.head_dim) for x in ("query", "key", "value")}

    def arguments(self, case: Case) -> dict:
        return {"window": case.window, "stride": case.stride, "dilation": case.dilation}

    def function(self, case: Case) -> Callable[..., Tensor]:
        return OPERATORS[len(case.shape)]

    def eager(self, case: Case, device: torch.device) -> Attend:
        return partial(unfold, keys_of_queries(case, device))

    def yardstick(self, case: Case, device: torch.device) -> Attend:
        """Masked dense attention, because gathered windows of a video are too large even for a crop."""
        mask = geometry.mask(case.axes, device)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = map(heads_first, (query, key, value))
            logits = (q @ k.transpose(-1, -2) * case.head_dim**-0.5).masked_fill(~mask, float("-inf"))
            return heads_last(logits.softmax(-1) @ v, query)

        return attend

    def crop(self, case: Case) -> Case:
        if case.batch * case.heads * prod(case.shape) ** 2 <= MOST_REFERENCE_LOGITS:
            return case
        axes = list(case.axes)
        while True:
            # a little more than a window, so that windows shift at borders
            shape = tuple(min(a.length, max(a.window * a.dilation + 4, 12)) for a in axes)
            wide = [i for i, a in enumerate(axes) if a.window // 2 >= max(a.stride, 4)]
            if prod(shape) <= MOST_CROPPED or not wide:
                break
            i = max(wide, key=lambda i: axes[i].window)
            axes[i] = axes[i]._replace(window=axes[i].window // 2)
        return replace(case, shape=shape, window=tuple(a.window for a in axes), heads=1, batch=1)

    def same_result(self, provider: str) -> bool:
        return super().same_result(provider) and "e4m3" not in provider

    def peers(self, case: Case, mode: str, device: torch.device) -> dict[str, Callable[[], Attend]]:
        shape = (case.batch, *case.shape, case.heads, case.head_dim)

        def make_unfold() -> Attend:
            gathered = 2 * prod(shape) * case.dtype.itemsize * prod(axis.window for axis in case.axes)
            if gathered > GATHERED[device.type]:
                raise SkippedError(f"would gather {gathered / 2**30:.0f} GiB")
            return self.eager(case, device)

        def make_flex() -> Attend:
            check_flex(mode, case.head_dim, device)
            return flex(window_mask(case, device))

        def make_natten() -> Attend:
            function = getattr(import_module("natten"), f"na{len(case.shape)}d")
            options = {"kernel_size": case.window, "stride": case.stride, "dilation": case.dilation}
            return lambda query, key, value: function(query, key, value, **options)

        made = dense_makers(shape, case.dtype, device) | {"flex": make_flex, "unfold": make_unfold}
        if mode == "forward" and case.head_dim >= 64 and case.dtype.itemsize == 2:
            e4m3 = partial(self.ours(case), qk_dtype=torch.float8_e4m3fn)  # rounding included
            made |= {"foveal e4m3": lambda: e4m3, "foveal e4m3 compiled": lambda: compiled(e4m3)}
        return made | ({"natten": make_natten} if find_spec("natten") else {})
