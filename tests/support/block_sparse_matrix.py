"""The test matrix of block-sparse attention: random cases, their inputs, and the rule for how exact a result must be.

    for case in cases(n=300, seed=0):
        check(case, torch.float64, "torch")

A case prints as the call that makes it again, so a failure can be pasted into a shell.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from random import Random

import operator_matrix
import torch
from foveal.kernels.block_sparse import call, reference, tiled
from foveal.kernels.block_sparse import mask as masks
from foveal.kernels.block_sparse.call import BlockSparseCall
from foveal.kernels.ops import BlockMask, block_sparse_attention
from operator_matrix import LAYOUTS, Inputs, as_leaves, gradients, lay_out, seeded_randn
from torch import Tensor

LENGTHS = {1: (1, 2, 5, 8, 13, 24, 37, 64, 90), 2: (1, 2, 3, 4, 6, 7, 9, 11, 13), 3: (1, 2, 3, 4, 5, 6)}
BOXES = {1: (1, 2, 4, 7, 16, 32, 70), 2: (1, 2, 3, 4, 5, 8), 3: (1, 2, 3, 4)}
MAX_TOKENS = 140
HEAD_DIMS = (1, 2, 3, 5, 8, 12, 16, 17, 24, 32, 40)
TENSORS = ("query", "key", "value", "additional_keys", "additional_values")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    query_block: tuple[int, ...]
    key_block: tuple[int, ...]
    most: int
    full: bool = False  # every list holds `most` boxes
    per_batch: bool = False
    per_head: bool = False
    bias: bool = False
    q_len: bool = False
    kv_len: bool = False
    inverse: bool = False
    batch: int = 1
    heads: int = 2
    key_heads: int = 2
    head_dim: int = 8
    value_dim: int | None = None  # that of keys
    scale: float | None = None
    extra: int = 0
    layout: str = "contiguous"
    seed: int = 0
    additional_mask: str = ""  # "mask", "lengths" or none
    per_key_head: bool = False  # lists, where there are more heads than key heads
    lengths_per_batch: bool = False
    skip: bool = False  # listed blocks, by a threshold far from all of their margins

    @property
    def options(self) -> dict:
        """Keyword arguments of the operator other than `impl` and tensors that have gradients."""
        visible = additional_mask(self, torch.device("cpu"))
        skip = {"skip_threshold": threshold(self)} if self.skip else {}
        return {"mask": make_mask(self), "scale": self.scale, "additional_mask": visible} | skip

    @property
    def query_boxes(self) -> int:
        return prod(masks.boxes(self.shape, self.query_block))

    @property
    def key_boxes(self) -> int:
        return prod(masks.boxes(self.key_shape, self.key_block))


def _grid(random: Random, rank: int) -> tuple[int, ...]:
    while True:
        shape = tuple(random.choice(LENGTHS[rank]) for _ in range(rank))
        if prod(shape) <= MAX_TOKENS:
            return shape


def _case(random: Random) -> Case:
    rank = random.choice((1, 2, 3))
    shape = _grid(random, rank)
    key_shape = shape if random.random() < 0.6 else _grid(random, rank)
    query_block, key_block = (tuple(random.choice(BOXES[rank]) for _ in range(rank)) for _ in range(2))
    heads = random.choice((1, 2, 3, 4))
    key_boxes = prod(masks.boxes(key_shape, key_block))
    batch = random.choice((0, 1, 1, 1, 2, 2, 3))
    case = Case(
        shape=shape,
        key_shape=key_shape,
        query_block=query_block,
        key_block=key_block,
        most=random.choice((1, key_boxes, random.randint(1, key_boxes))),
        full=random.random() < 0.4,
        per_batch=random.random() < 0.5,
        per_head=random.random() < 0.5,
        bias=random.random() < 0.35,
        q_len=random.random() < 0.25,
        kv_len=random.random() < 0.25,
        inverse=random.random() < 0.3,
        batch=batch,
        heads=heads,
        key_heads=random.choice([h for h in range(1, heads + 1) if heads % h == 0]),
        head_dim=random.choice(HEAD_DIMS),
        scale=random.choice((None, None, None, 0.2, -0.7, 0.0)),
        extra=random.choice((0, 0, 0, 1, 2, 17)),
        layout=random.choice(LAYOUTS),
        seed=random.randrange(2**31),
        value_dim=random.choice((None, None, None, random.choice(HEAD_DIMS))),
    )
    return replace(
        case,
        additional_mask=random.choice(("", "mask", "lengths")) if case.extra else "",
        per_key_head=random.random() < 0.4,
        lengths_per_batch=random.random() < 0.5,
    )


def cases(n: int, seed: int) -> Iterator[Case]:
    """`n` random cases; the i-th depends on (seed, i) only."""
    for i in range(n):
        yield _case(Random(f"{seed}/{i}"))


def plain(case: Case, head_dim: int, query_block: tuple[int, ...], key_block: tuple[int, ...]) -> Case:
    """The case with these blocks and heads, without bias, lengths and extra keys, in a layout for descriptors."""
    layout = ("contiguous", "fused", "heads_first")[case.seed % 3]
    scale = case.scale if case.scale is None or case.scale > 0 else None
    case = replace(case, query_block=query_block, key_block=key_block, head_dim=head_dim, value_dim=None, scale=scale)
    case = replace(case, bias=False, q_len=False, kv_len=False, extra=0, additional_mask="", skip=False, layout=layout)
    return replace(case, most=min(case.most, case.key_boxes))


def for_gluon(case: Case) -> Case:
    """The case as `impl="gluon"` takes it, on larger grids."""
    shape, key_shape = (tuple(3 * n for n in lengths) for lengths in (case.shape, case.key_shape))
    query_block, key_block = {1: ((128,), (64,)), 2: ((8, 16), (8, 8)), 3: ((4, 4, 8), (4, 4, 4))}[len(shape)]
    key_block = query_block if case.seed % 3 == 0 else key_block
    return plain(replace(case, shape=shape, key_shape=key_shape), 64 << case.seed % 2, query_block, key_block)


def make_mask(case: Case, device: str | torch.device = "cpu", inverse: bool | None = None) -> BlockMask:
    """Random lists, their ignored entries full of nonsense; with its inverse if the case says so."""
    generator = torch.Generator().manual_seed(case.seed + 7)

    def integers(high: int, size: tuple[int, ...]) -> Tensor:
        return torch.randint(0, high, size, generator=generator, dtype=torch.int32)

    lists = case.key_heads if case.per_key_head else case.heads
    lead = (case.batch if case.per_batch else 1, lists if case.per_head else 1, case.query_boxes)
    rows = (case.batch,) if case.lengths_per_batch else ()
    kv_idx = torch.rand(*lead, case.key_boxes, generator=generator).argsort(-1)[..., : case.most].int()
    kv_num = torch.full(lead, case.most, dtype=torch.int32) if case.full else integers(case.most + 1, lead)
    kv_idx = torch.where(masks.listed(kv_num, kv_idx), kv_idx, -(10**6))
    found = BlockMask(
        case.query_block,
        case.key_block,
        kv_num,
        kv_idx,
        torch.randn(kv_idx.shape, generator=generator) if case.bias else None,
        integers(prod(case.query_block) + 1, (*rows, case.query_boxes)) if case.q_len else None,
        integers(prod(case.key_block) + 1, (*rows, case.key_boxes)) if case.kv_len else None,
    )
    found = BlockMask(*(x.to(device) if isinstance(x, Tensor) else x for x in found))
    return found.with_inverse(case.key_shape) if (case.inverse if inverse is None else inverse) else found


def make_inputs(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> Inputs:
    """Tensor arguments by name, None where the case has none: leaves that require gradients, values set by the seed."""
    randn = seeded_randn(case.seed, dtype, device)
    counts = (case.heads, case.key_heads, case.key_heads)
    query, key, value = lay_out(case.layout, randn, case.batch, case.shape, counts, case.head_dim)
    if case.key_shape != case.shape:
        _, key, value = lay_out(case.layout, randn, case.batch, case.key_shape, counts, case.head_dim)
    if case.value_dim:
        *_, value = lay_out(case.layout, randn, case.batch, case.key_shape, counts, case.value_dim)
    tensors: Inputs = dict(zip(TENSORS, (query, key, value, None, None), strict=True))
    if case.extra:
        for name, x in (("additional_keys", key), ("additional_values", value)):
            tensors[name] = randn(case.batch, case.extra, *x.shape[-2:])
    return as_leaves(tensors)


def visible_tokens(case: Case) -> Tensor:
    """Which additional tokens are visible, bool `[B, extra]`: none of the first of several batch entries."""
    generator = torch.Generator().manual_seed(case.seed + 11)
    visible = torch.rand(case.batch, case.extra, generator=generator) < 0.6
    if case.batch > 1:
        visible[0] = False
    if case.additional_mask == "lengths":
        visible = torch.arange(case.extra) < visible.sum(1)[:, None]
    return visible


def additional_mask(case: Case, device: torch.device) -> Tensor | None:
    """The argument of a case, as it says."""
    if not case.additional_mask:
        return None
    visible = visible_tokens(case).to(device)
    return visible.sum(1) if case.additional_mask == "lengths" else visible


@lru_cache
def threshold(case: Case) -> float | None:
    """A `skip_threshold` in the widest gap between margins of blocks, so that rounding decides about none.

    None where fewer than two blocks are below earlier ones, or no gap is wide.
    """
    inputs, mask = make_inputs(case, torch.float32), make_mask(case)
    query, key = (inputs[name].detach().double() for name in ("query", "key"))
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    margins = tiled.block_margins(query, key, mask, scale)
    of_list = masks.by_head(masks.listed(mask.kv_num, mask.kv_idx), case.heads)
    margins = margins[of_list.expand(margins.shape)]
    margins = margins[(margins < 0) & margins.isfinite()].sort().values
    if len(margins) < 2 or (margins.diff().max()) < 1e-3:
        return None
    widest = int(margins.diff().argmax())
    return 2 ** float(margins[widest : widest + 2].mean())


def make_call(case: Case, inputs: Inputs) -> BlockSparseCall:
    """The call of a case."""
    return call.make_call(**inputs, **case.options)


WITH_LSE = partial(block_sparse_attention, return_lse=True)


def run(
    case: Case,
    inputs: Inputs,
    impl: str,
    operator: Callable = WITH_LSE,
    mask: BlockMask | None = None,
) -> dict[str, Tensor]:
    """Forward and backward of the public operator (or of `operator`, e.g. compiled): out, lse and every gradient."""
    mask = make_mask(case, inputs["query"].device) if mask is None else mask
    visible = additional_mask(case, inputs["query"].device)
    skip = {"skip_threshold": threshold(case)} if case.skip else {}
    out, lse = operator(**inputs, additional_mask=visible, mask=mask, scale=case.scale, impl=impl, **skip)
    # what is -inf for lack of keys has no gradient
    lse = lse.masked_fill(lse == float("-inf"), 0)
    return gradients(inputs, out, lse, case.seed + 1)


def run_eager(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Forward and backward of masked attention in which every step rounds to the dtype of the inputs."""
    dtype, mask = inputs["query"].dtype, make_mask(case, inputs["query"].device)
    q, k, v = (
        inputs[name].flatten(1, -3).transpose(1, 2).repeat_interleave(case.heads // inputs[name].shape[-2], dim=1)
        for name in TENSORS[:3]
    )
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    logits = q @ k.transpose(-1, -2) * scale
    logits = logits + masks.by_head(reference.dense_bias(mask, case.shape, case.key_shape, dtype), case.heads)
    if inputs["additional_keys"] is not None:
        ek, ev = (
            inputs[name].transpose(1, 2).repeat_interleave(case.heads // case.key_heads, dim=1) for name in TENSORS[3:]
        )
        to_additional = q @ ek.transpose(-1, -2) * scale
        if case.additional_mask:
            visible = visible_tokens(case).to(q.device)
            to_additional = to_additional.masked_fill(~visible[:, None, None], float("-inf"))
        logits, v = torch.cat([logits, to_additional], -1), torch.cat([v, ev], 2)
    if mask.q_len is not None:
        box, place = masks.box_of_token(case.shape, case.query_block, q.device)
        absent = place >= masks.by_entry(mask.q_len)[:, box]
        logits = logits.masked_fill(absent[:, None, :, None], float("-inf"))
    empty = (logits == float("-inf")).all(-1)
    logits = logits.masked_fill(empty[..., None], 0)
    out = (logits.softmax(-1) @ v).masked_fill(empty[..., None], 0)
    lse = logits.to(torch.promote_types(dtype, torch.float32)).logsumexp(-1).masked_fill(empty, 0)
    return gradients(inputs, *(x.transpose(1, 2).unflatten(1, case.shape) for x in (out, lse)), case.seed + 1)


def check(case: Case, dtype: torch.dtype, impl: str, device: str | torch.device = "cpu", **options) -> None:
    """Assert that `impl` keeps the error rule on this case, naming the case and everything that breaks it."""
    inputs = make_inputs(case, dtype, device)
    got = run(case, inputs, impl, **options)
    exact = run(case, as_leaves(inputs, torch.float64), "reference")
    eager = run_eager(case, inputs) if dtype.itemsize < 4 else None
    operator_matrix.assert_exact(operator_matrix.errors(got, exact, eager, dtype), f"{impl} in {dtype} on {case!r}")
