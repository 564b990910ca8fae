"""The test matrix of scored attention: random cases, their inputs, and the rule for how exact a result must be.

    for case in cases(n=300, seed=0):
        check(case, torch.float64, "torch")

A case prints as the call that makes it again, so a failure can be pasted into a shell.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import log, prod
from random import Random

import operator_matrix
import torch
from foveal.kernels.ops import scored_attention
from foveal.kernels.scored import ColumnMask, CoPE, Parallax, Score, Signed, Softmax, Softplus
from foveal.kernels.scored.call import FusedCall, to_fused
from foveal.kernels.scored.call import make_call as checked
from operator_matrix import LAYOUTS, Inputs, as_leaves, gradients, lay_out, seeded_randn
from torch import Tensor
from torch.nn import functional as F

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 31, 33, 48, 70, 150)
MAX_TOKENS = 320
HEAD_DIMS = (1, 2, 3, 5, 8, 12, 16, 17, 24, 32, 40)
KINDS = ("softmax", "signed", "softplus", "power", "cope", "parallax")
MASKS = ("causal", "documents", "band", "random", "empty rows")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    kind: str = "softmax"
    key_shape: tuple[int, ...] | None = None  # that of queries
    batch: int = 1
    heads: int = 2
    key_heads: int | None = None
    head_dim: int = 8
    value_dim: int | None = None  # that of keys
    mask: str | None = None
    length_scale: bool = False
    power: float = 3.0
    offset: float = 0.5
    positions: int = 6
    scaled: bool = True
    scale: float | None = None
    layout: str = "contiguous"
    seed: int = 0

    @property
    def keys(self) -> tuple[int, ...]:
        """Grid of the keys."""
        return self.shape if self.key_shape is None else self.key_shape

    @property
    def options(self) -> dict:
        """Keyword arguments of `attend` other than its tensors and `impl`."""
        names = ("kind", "mask", "length_scale", "power", "offset", "scaled", "scale", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def has_lse(self) -> bool:
        return self.kind not in ("softplus", "power")


def make_mask(
    name: str | None,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    seed: int,
    device: str | torch.device = "cpu",
) -> ColumnMask | None:
    """The mask of a case; one of "random" has three intervals per batch entry and head, in an order of rows.

    Graphs can make it, since its numbers come from plain arithmetic.
    """

    def integers(salt: int, low: int, high: int, *size: int) -> Tensor:
        x = torch.arange(prod(size), device=device) * 48271 + seed % 65537 + salt
        return (low + x * x % 65537 % (high - low + 1)).view(size)

    if name is None:
        return None
    rows = torch.arange(queries, device=device)
    columns = torch.arange(keys, device=device) * queries // keys  # a place of each key among the rows
    if name == "causal":
        return ColumnMask(torch.full_like(columns, -1)[None, None], columns[None, None], rows=rows)
    if name == "documents":  # as `band` with a reach of 0
        of_rows, of_columns = rows * 3 // queries, columns * 3 // queries
        start = torch.stack([torch.full_like(of_columns, -9), of_columns + 1], -1)
        end = torch.stack([of_columns, torch.full_like(of_columns, 9)], -1)
        return ColumnMask(start[None, None], end[None, None], rows=of_rows)
    if name == "band":
        reach = queries // 3
        start2, end2 = columns + reach + 1, torch.full_like(columns, queries)
        start, end = torch.zeros_like(columns), columns - reach
        return ColumnMask(*(x[None, None].expand(batch or 1, heads, keys) for x in (start, end, start2, end2)))
    if name == "empty rows":
        start = torch.zeros_like(columns).expand(1, heads, keys)
        return ColumnMask(start, start + 1 + queries // 2)
    start = integers(0, -2, queries, batch or 1, heads, keys, 3)
    return ColumnMask(start, start + integers(77, -1, 1 + queries // 2, *start.shape), rows=rows.flip(0))


def make_score(kind: str, table: Tensor | None, r: Tensor | None, options: dict) -> Score:
    """The score of a case."""
    if kind == "cope":
        assert table is not None
        return CoPE(table, scaled=options["scaled"])
    if kind == "parallax":
        assert r is not None
        return Parallax(r)
    if kind in ("softplus", "power"):
        power = options["power"] if kind == "power" else 0.0
        return Softplus(power, options["offset"], options["length_scale"])
    return {"softmax": Softmax, "signed": Signed}[kind]()


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor | None, r: Tensor | None, options: dict
) -> dict:
    """Keyword arguments of `scored_attention` beside the operands."""
    keys = prod(key.shape[1:-2])
    sizes = query.shape[0], query.shape[-2], prod(query.shape[1:-2]), keys
    mask = make_mask(options["mask"], *sizes, options["seed"], query.device)
    return {"score": make_score(options["kind"], table, r, options), "mask": mask, "scale": options["scale"]}


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor | None = None,
    r: Tensor | None = None,
    *,
    impl: str = "auto",
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """`scored_attention` of a case, whose tensors come by name; with the log-sum-exp where there is one."""
    arguments = _arguments(query, key, value, table, r, options)
    has_lse = arguments["score"].has_lse
    return scored_attention(query, key, value, **arguments, return_lse=has_lse, impl=impl)


def _shape(random: Random) -> tuple[int, ...]:
    """A grid of one to three axes."""
    while True:
        shape = tuple(random.choice(LENGTHS) for _ in range(random.choice((1, 1, 2, 2, 3))))
        if prod(shape) <= MAX_TOKENS:
            return shape


def _case(random: Random) -> Case:
    shape, heads = _shape(random), random.choice((1, 2, 3, 4))
    other = _shape(random)
    return Case(
        shape=shape,
        kind=random.choice(KINDS),
        key_shape=random.choice((None, None, other if len(other) == len(shape) else None)),
        batch=random.choice((0, 1, 1, 1, 1, 2, 2, 3)),
        heads=heads,
        key_heads=random.choice((None, None, 1)),
        head_dim=random.choice(HEAD_DIMS),
        value_dim=random.choice((None, None, random.choice(HEAD_DIMS))),
        mask=random.choice((None, *MASKS)),
        length_scale=random.random() < 0.4,
        power=random.choice((1.0, 2.5, 3.0)),
        offset=random.choice((0.0, 0.5, 1.0, 1.4, -0.2)),
        positions=random.choice((2, 3, 6, 17, 40)),
        scaled=random.random() < 0.5,
        scale=random.choice((None, None, 0.3, 1.0, -0.4)),
        layout=random.choice(LAYOUTS),
        seed=random.randrange(2**31),
    )


def cases(n: int, seed: int) -> Iterator[Case]:
    """`n` random cases; the i-th depends on (seed, i) only."""
    for i in range(n):
        yield _case(Random(f"{seed}/{i}"))


def make_inputs(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> Inputs:
    """Tensor arguments by name, None where the case has none: leaves that require gradients, values set by the seed."""
    randn = seeded_randn(case.seed, dtype, device)
    heads = case.heads, *(case.key_heads or case.heads,) * 2

    def tokens(shape: tuple[int, ...], head_dim: int) -> tuple[Tensor, ...]:
        return lay_out(case.layout, randn, case.batch, shape, heads, head_dim)

    query, key, value = tokens(case.shape, case.head_dim)
    if case.keys != case.shape:
        _, key, value = tokens(case.keys, case.head_dim)
    if case.value_dim:
        *_, value = tokens(case.keys, case.value_dim)
    tensors: Inputs = {"query": query, "key": key, "value": value}
    if case.kind == "cope":
        tensors["table"] = randn(case.head_dim, case.positions)
    if case.kind == "parallax":
        tensors["r"] = tokens(case.shape, case.head_dim)[0]
    return as_leaves(tensors)


def make_call(case: Case, inputs: Inputs) -> FusedCall:
    """The call of a case as the dispatcher's operator takes it."""
    tensors = [inputs[name] for name in ("query", "key", "value")]
    arguments = _arguments(*tensors, inputs.get("table"), inputs.get("r"), case.options)  # pyright: ignore[reportArgumentType]
    return to_fused(*tensors, checked(*tensors, **arguments))[-1]  # pyright: ignore[reportArgumentType]


def run(case: Case, inputs: Inputs, impl: str, operator: Callable = attend) -> dict[str, Tensor]:
    """Forward and backward of the operator (or of one like it, e.g. compiled): out, lse and every gradient."""
    found = operator(**inputs, **case.options, impl=impl)
    out, lse = (found, None) if isinstance(found, Tensor) else found
    return gradients(inputs, out, lse, case.seed + 1)


def run_eager(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Forward and backward in which every step rounds to the dtype of the inputs."""
    names = ("query", "key", "value")
    q, k, v = (inputs[name].flatten(1, -3).transpose(1, 2) for name in names)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    mask = make_mask(case.mask, q.shape[0], q.shape[1], q.shape[2], k.shape[2], case.seed, q.device)
    every = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    seen = (every if mask is None else mask.visible(q.shape[2])).expand(*q.shape[:3], k.shape[2])
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    s, count, lse = q @ k.mT * scale, seen.sum(-1, keepdim=True).to(q), None
    if case.kind in ("softplus", "power"):
        if case.length_scale:
            s = s * (log(case.head_dim) * count.clamp_min(1).log())
        weights = F.softplus(s).masked_fill(~seen, 0)
        weights = weights / weights.sum(-1, keepdim=True).masked_fill(~seen.any(-1, keepdim=True), 1)
        if case.kind == "power":
            excess = (weights * count - case.offset).relu().masked_fill(~seen, 0)
            largest = excess.amax(-1, keepdim=True)
            sharp = torch.where(excess > 0, excess / largest.masked_fill(largest == 0, 1), 1.0) ** case.power
            sharp = sharp * (excess > 0)
            sharp = sharp / sharp.sum(-1, keepdim=True).masked_fill(largest == 0, 1)
            weights = torch.where(largest > 0, sharp, weights)
    else:
        x = s
        if case.kind == "cope":
            table = inputs["table"]
            at = s.sigmoid().masked_fill(~seen, 0).flip(-1).cumsum(-1).flip(-1).clamp(max=table.shape[1] - 1)
            low, high = ((q @ table).gather(-1, f(at.detach()).long()) for f in (torch.floor, torch.ceil))
            bias = torch.lerp(low, high, at - at.floor().detach())
            x = s + (bias * scale if case.scaled else bias)
        if case.kind == "signed":
            x = s.abs()
        x = x.masked_fill(~seen, -torch.inf)
        lse = x.logsumexp(-1).masked_fill(~seen.any(-1), -torch.inf)
        weights = (x - lse.masked_fill(~seen.any(-1), 0)[..., None]).exp()
        if case.kind == "signed":
            weights = weights * s.sign()
        if case.kind == "parallax":
            tilt = inputs["r"].flatten(1, -3).transpose(1, 2) @ k.mT
            weights = weights * (1 + (weights * tilt).sum(-1, keepdim=True) - tilt)
        lse = lse.transpose(1, 2).reshape(inputs["query"].shape[:-1])
    out = (weights @ v).transpose(1, 2).reshape(*inputs["query"].shape[:-1], v.shape[-1])
    return gradients(inputs, out, lse, case.seed + 1)


errors = partial(operator_matrix.measure, sys.modules[__name__])
check = partial(operator_matrix.hold, sys.modules[__name__])
