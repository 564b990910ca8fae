"""Bi-level routing against gathered regions, as it is usually written, and dense attention.

The gather copies keys and values of the chosen regions for each region, then attends densely. Both choose regions in
the same way.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from foveal.kernels.block_sparse.routing import make_routing_mask
from foveal.kernels.ops import block_sparse_attention, routing_attention2d
from torch import Tensor

from ..benchmark import SkippedError
from ..operators import MOST_REFERENCE_LOGITS, Operator, Tensors, randn
from ..peers import Attend, dense_makers

MAPS = {"224x224": ((56, 56), (28, 28), (14, 14)), "600x500": ((154, 126), (77, 63), (42, 35))}
MAPS["1024x1024"] = ((259, 259), (133, 133), (70, 70))  # padded to regions
HEADS, TOPK = (2, 4, 8), (1, 4, 16)
GATHERED = 16 << 30  # bytes of keys and values that the gather may copy


@dataclass(frozen=True)
class Case:
    """One of BiFormer's first three stages at one input size."""

    source: str
    size: str
    shape: tuple[int, int]
    heads: int
    topk: int
    batch: int = 1
    dtype: torch.dtype = torch.float32
    regions: int = 7
    kernel = "routing"

    @property
    def name(self) -> str:
        text = f"{self.shape[0]}x{self.shape[1]} h{self.heads}x32 topk{self.topk}"
        return (f"{self.size} {text}" if self.size else text) + (f" b{self.batch}" if self.batch != 1 else "")

    @property
    def region(self) -> tuple[int, int]:
        return self.shape[0] // self.regions, self.shape[1] // self.regions


def gather(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Routing with the tokens of the chosen regions gathered."""
    batch, _, _, heads, d = query.shape
    size = case.region
    chosen = make_routing_mask(query, key, size=size, topk=case.topk).kv_idx[:, 0].long()  # [B, regions, topk]

    def regions(x: Tensor) -> Tensor:  # [B, regions, tokens, C]
        x = x.reshape(batch, case.regions, size[0], case.regions, size[1], heads * d)
        return x.transpose(2, 3).reshape(batch, case.regions**2, size[0] * size[1], heads * d)

    q, k, v = map(regions, (query, key, value))
    kv = torch.cat([k, v], -1)
    index = chosen[..., None, None].expand(-1, -1, -1, *kv.shape[2:])
    kv = kv[:, None].expand(-1, case.regions**2, -1, -1, -1).gather(2, index)  # [B, regions, topk, tokens, 2 C]
    k, v = (x.unflatten(-1, (heads, d)).transpose(-2, -3) for x in kv.flatten(2, 3).chunk(2, -1))
    q = q.unflatten(-1, (heads, d)).transpose(-2, -3)
    out = ((q * (heads * d) ** -0.5) @ k.mT).softmax(-1) @ v  # [B, regions, heads, tokens, d]
    out = out.transpose(2, 3).reshape(batch, case.regions, case.regions, *size, heads, d).transpose(2, 3)
    return out.reshape(query.shape)


class Routing(Operator):
    name = "routing"
    title = "Bi-level routing attention"
    folder = "block_sparse"

    def cases(self, device: torch.device, *, everything: bool = False) -> Iterator[Case]:
        on_cpu = device.type == "cpu"
        for (size, shapes), batch in zip(MAPS.items(), (1, 1, 1) if on_cpu else (64, 8, 4), strict=True):
            for stage, (shape, heads, topk) in enumerate(zip(shapes, HEADS, TOPK, strict=True), 1):
                dtype = torch.float32 if on_cpu else torch.bfloat16
                yield Case(f"BiFormer-T stage {stage}", size, shape, heads, topk, batch, dtype)

    def scaling(self, device: torch.device) -> list[Case]:
        sides = (63, 126, 252) if device.type == "cpu" else (63, 126, 252, 504)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return [Case("BiFormer-T stage 1, larger", "", (n, n), 2, 1, dtype=dtype) for n in sides]

    def inputs(self, case: Case, device: torch.device) -> Tensors:
        draw = randn(device, case.dtype)
        return {x: draw(case.batch, *case.shape, case.heads, 32) for x in ("query", "key", "value")}

    def arguments(self, case: Case) -> dict:
        return {"regions": case.regions, "topk": case.topk}

    def function(self, case: Case) -> Callable[..., Tensor]:
        return routing_attention2d

    def definition(self, case: Case, given: Tensors) -> Attend:
        """Reference on the regions chosen in the dtype of the case, because float64 can break near ties differently."""
        mask = make_routing_mask(given["query"], given["key"], size=case.region, topk=case.topk)
        return partial(block_sparse_attention, mask=mask, scale=(case.heads * 32) ** -0.5, impl="reference")

    def eager(self, case: Case, device: torch.device) -> Attend:
        return partial(gather, case)

    def crop(self, case: Case) -> Case:
        """Fewer regions of the same size, because kernels are compiled per size."""
        tokens = prod(case.region)
        regions = max(n for n in range(2, case.regions + 1) if n == 2 or (n**2 * tokens) ** 2 <= MOST_REFERENCE_LOGITS)
        shape = (regions * case.region[0], regions * case.region[1])
        return replace(case, shape=shape, regions=regions, topk=min(case.topk, regions**2), heads=1, batch=1)

    def peers(self, case: Case, mode: str, device: torch.device) -> dict[str, Callable[[], Attend]]:
        shape = (case.batch, *case.shape, case.heads, 32)

        def make_gather() -> Attend:
            copied = 2 * case.batch * case.shape[0] * case.shape[1] * case.heads * 32 * case.topk * case.dtype.itemsize
            if copied > GATHERED:
                raise SkippedError(f"would copy {copied / 2**30:.0f} GiB of keys and values")
            return self.eager(case, device)

        return {"gather": make_gather} | dense_makers(shape, case.dtype, device)
