"""Video sparse attention by masks, choice of blocks included, against dense attention and flex_attention on its lists.

Dynamic masks choose in every call, static ones once. flex_attention takes the same lists, chosen outside of its time,
on tokens that are permuted block by block: `flex` is its kernel alone, `flex permuted` with the permutation, which its
users pay unless their whole model keeps that order.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import torch
from foveal.kernels.block_sparse import cost
from foveal.kernels.masks import REGISTRY
from foveal.kernels.masks.named import attend_lists, listed_tokens, named_lists
from foveal.kernels.ops import BlockMask
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexMask

from ..benchmark import SkippedError, Work
from ..operators import Operator, Tensors, randn
from ..peers import Attend, check_flex, dense_makers, flex

# method -> its options, for a fifth to three tenths of the pairs on the grids below
METHODS: dict[str, dict[str, Any]] = {
    "vsa": {"sparsity": 0.75, "block": 4},
    "vmoba": {"topk": 16, "block": (4, 4, 8), "query_block": (2, 4, 8)},
    "sla": {"ratio": 0.25, "query_block": (2, 4, 8), "key_block": (2, 4, 8)},
    "sta": {"window": (3, 5, 5), "tile": 4},
    "radial": {"block": 64},
    "psa": {"ends": {1: 0.15, 2: 0.3, 4: 0.45, 8: 0.7}, "rule": "topk"},
}
# on CPU: radial attention thins out over frames, and eight frames are two tiles
GRIDS = {"radial": (64, 16, 16)}
OPTIONS = {"sta": {"window": (1, 5, 5), "tile": 4}}


@dataclass(frozen=True)
class Case:
    method: str
    grid: tuple[int, int, int]
    heads: int
    head_dim: int = 64
    options: dict = field(default_factory=dict, hash=False)  # in place of those of METHODS
    dtype: torch.dtype = torch.float32
    kernel = "masks"

    @property
    def name(self) -> str:
        return f"{self.method} {'x'.join(map(str, self.grid))} h{self.heads}x{self.head_dim}"

    @property
    def source(self) -> str:
        entry = REGISTRY[self.method]
        return f"arXiv:{entry.paper}" if entry.paper else self.method

    @property
    def given(self) -> dict[str, Any]:
        """Options of the method."""
        return self.options or METHODS[self.method]

    def lists(self, query: Tensor, key: Tensor) -> BlockMask:
        """The mask for these tokens."""
        return named_lists(query, key, self.method, self.given, flat=self.method == "psa")

    @property
    def tokens(self) -> Callable[[Tensor], Tensor] | None:
        """What lists number, of keys or values `[B, tokens, heads, d]`."""
        return listed_tokens(self.method, self.given)


def masked(case: Case, query: Tensor, key: Tensor, value: Tensor, impl: str = "auto") -> Tensor:
    """Block-sparse attention by the mask of a case, made for these tokens."""
    return attend_lists(query, key, value, mask=case.lists(query, key), tokens=case.tokens, impl=impl)


def gathered(
    mask: BlockMask, tokens: Callable[[Tensor], Tensor] | None, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """All logits, by a dense mask, in the dtype of the inputs."""
    from foveal.kernels.block_sparse.reference import dense_bias

    grid = query.shape[1:-2]
    flat = [x.flatten(1, -3) for x in (query, key, value)]
    q, k, v = (x.transpose(1, 2) for x in (flat if tokens is None else (flat[0], *map(tokens, flat[1:]))))
    shapes = (grid, grid) if len(mask.query_block) == len(grid) else ((q.shape[2],), (k.shape[2],))
    weights = (q @ k.mT * q.shape[-1] ** -0.5 + dense_bias(mask, *shapes, q.dtype)).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(query.shape)


def pooled_share(ends: Mapping[int, float]) -> float:
    """Keys that PSA's levels leave over all keys: a level of means of n keys reaches from the end before to its own."""
    befores = (0.0, *ends.values())
    return sum((end - before) / level for (level, end), before in zip(ends.items(), befores, strict=False))


def by_block(grid: tuple[int, ...], block: tuple[int, ...]) -> Tensor:
    """Tokens of a grid that the blocks divide, block after block."""
    counts = [n // b for n, b in zip(grid, block, strict=True)]
    numbers = torch.arange(prod(grid)).view([x for pair in zip(counts, block, strict=True) for x in pair])
    axes = range(len(grid))
    return numbers.permute(*(2 * a for a in axes), *(2 * a + 1 for a in axes)).flatten()


def flex_lists(case: Case, mask: BlockMask, *, permute: bool) -> Attend:
    """flex_attention on the lists of a mask."""
    grid = case.grid if len(mask.query_block) == 3 else (prod(case.grid),)
    if mask.query_block != mask.key_block or any(n % b for n, b in zip(grid, mask.query_block, strict=True)):
        raise SkippedError("flex_attention takes blocks of one size that divide the grid")
    kv_num, kv_idx = mask.kv_num, mask.kv_idx
    padded = torch.zeros(*kv_idx.shape[:-1], kv_num.shape[-1], dtype=torch.int32, device=kv_idx.device)
    listed = torch.arange(kv_idx.shape[-1], device=kv_idx.device) < kv_num[..., None]
    padded[..., : kv_idx.shape[-1]] = torch.where(listed, kv_idx, 0)
    blocks = FlexMask.from_kv_blocks(kv_num, padded, BLOCK_SIZE=prod(mask.query_block), mask_mod=None)
    order = by_block(grid, mask.query_block).to(kv_idx.device)
    attend, back = flex(blocks), order.argsort()

    def permuted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens = (x.flatten(1, 3)[:, order] for x in (query, key, value))
        return attend(*tokens)[:, back].reshape(query.shape)

    def as_they_are(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(*(x.flatten(1, 3) for x in (query, key, value))).reshape(query.shape)

    return permuted if permute else as_they_are


class Masks(Operator):
    name = "masks"
    title = "Video sparse attention by masks"
    folder = "block_sparse"

    def cases(self, device: torch.device, *, everything: bool = False) -> Iterator[Case]:
        if device.type == "cpu":
            for method in METHODS:
                yield Case(method, GRIDS.get(method, (8, 32, 32)), 2, options=OPTIONS.get(method, {}))
            yield Case("sla", (16, 32, 32), 1, options=METHODS["sla"] | {"ratio": 0.2})
            return
        for grid in ((21, 30, 52), (21, 45, 80)):  # Wan at 480p and 720p
            for method in METHODS:
                yield Case(method, grid, 12, 128, dtype=torch.bfloat16)

    def scaling(self, device: torch.device) -> list[Case]:
        """Lists of 16 blocks of 64 tokens whatever the number of tokens."""
        frames = (4, 16, 64) if device.type == "cpu" else (16, 64, 256)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return [Case("sla", (t, 32, 32), 1, options=self._fixed(t * 1024), dtype=dtype) for t in frames]

    @staticmethod
    def _fixed(tokens: int) -> dict:
        return METHODS["sla"] | {"ratio": 16 * 64 / tokens}

    def inputs(self, case: Case, device: torch.device) -> Tensors:
        draw = randn(device, case.dtype)
        return {x: draw(1, *case.grid, case.heads, case.head_dim) for x in ("query", "key", "value")}

    def arguments(self, case: Case) -> dict:
        return {}

    def function(self, case: Case) -> Callable[..., Tensor]:
        return partial(masked, case)

    def definition(self, case: Case, given: Tensors) -> Attend:
        """Reference on the blocks chosen in the dtype of the case: in float64 near ties may break differently."""
        lists = case.lists(given["query"], given["key"])
        return partial(attend_lists, mask=lists, tokens=case.tokens, impl="reference")

    def eager(self, case: Case, device: torch.device) -> Attend:
        given = self.inputs(case, device)
        return partial(gathered, case.lists(given["query"], given["key"]), case.tokens)

    def crop(self, case: Case) -> Case:
        return replace(case, grid=(4, 12, 16), heads=1)

    def work(self, case: Case, mode: str) -> Work:
        """Of the lists of a static mask, of full ones of a dynamic mask, and of the shares of PSA's levels; making
        lists is not counted."""
        if case.method == "psa":
            pairs = round(pooled_share(case.given["ends"]) * case.heads * prod(case.grid) ** 2)
        elif REGISTRY[case.method].dynamic:
            tensors = self.inputs(case, torch.device("meta"))
            mask = case.lists(tensors["query"], tensors["key"])
            pairs = case.heads * prod(case.grid) * mask.kv_idx.shape[-1] * prod(mask.key_block)
        else:
            nothing = torch.empty(1, *case.grid, 1, 1)
            mask = case.lists(nothing, nothing)
            shape = case.grid if len(mask.query_block) == 3 else (prod(case.grid),)
            pairs = cost.visible_pairs(mask, shape, shape, batch=1, heads=case.heads)
        both = mode != "forward"
        flops = cost.forward_flops(pairs, case.head_dim) + both * cost.backward_flops(pairs, case.head_dim)
        tensor = prod(case.grid) * case.heads * case.head_dim * case.dtype.itemsize
        return Work(flops, (4 + 8 * both) * tensor + (1 + both) * prod(case.grid) * case.heads * 4)

    def peers(self, case: Case, mode: str, device: torch.device) -> dict[str, Callable[[], Attend]]:
        def make_flex(permute: bool) -> Attend:
            check_flex(mode, case.head_dim, device)
            given = self.inputs(case, device)
            return flex_lists(case, case.lists(given["query"], given["key"]), permute=permute)

        shape = (1, *case.grid, case.heads, case.head_dim)
        made: dict[str, Callable[[], Attend]] = {"flex permuted": partial(make_flex, True)}
        made["flex"] = partial(make_flex, False)
        return made | dense_makers(shape, case.dtype, device)

    def same_result(self, provider: str) -> bool:
        return provider != "flex" and super().same_result(provider)
