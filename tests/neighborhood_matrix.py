"""The test matrix of neighborhood attention: random cases, their inputs, and the rule for how exact a result must be.

    for case in cases(rank=2, n=300, seed=0):
        check(case, torch.float64, "tiled")

A case prints as the call that makes it again, so a failure can be pasted into a shell.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from random import Random

import torch
from foveal.kernels.neighborhood import geometry
from foveal.kernels.ops import na1d_lse, na2d_lse, na3d_lse
from torch import Tensor

OPERATORS = {1: na1d_lse, 2: na2d_lse, 3: na3d_lse}
LENGTHS = {
    1: (1, 2, 3, 5, 8, 13, 16, 24, 31, 37, 48, 64, 97, 150),
    2: (1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 19, 23),
    3: (1, 2, 3, 4, 5, 6, 7, 8, 9, 11),
}
MAX_TOKENS = 420
HEAD_DIMS = (1, 2, 3, 4, 5, 8, 12, 16, 17, 24, 32, 40)
LAYOUTS = ("contiguous", "heads_first", "channels_first", "fused", "expanded", "offset")
TENSORS = ("query", "key", "value", "bias", "extra_key", "extra_value")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    batch: int = 1
    heads: int = 2
    key_heads: int = 2
    head_dim: int = 8
    bias: bool = False
    scale: float | None = None
    extra: int = 0
    layout: str = "contiguous"
    seed: int = 0

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def axes(self) -> tuple[geometry.Axis, ...]:
        return tuple(map(geometry.Axis, self.shape, self.window, self.stride, self.dilation, self.causal))

    @property
    def options(self) -> dict:
        """Keyword arguments of the operator other than its tensors and `impl`."""
        names = ("window", "stride", "dilation", "causal", "scale")
        return {name: getattr(self, name) for name in names}


def _axis(random: Random, length: int, odd: bool) -> tuple[int, int, int, bool]:
    """Window, stride, dilation and causality for an axis, every legal value possible, corner values likely."""
    window = random.choice((length, random.randint(1, length), random.randint(1, min(length, 7))))
    window -= odd and window % 2 == 0
    most = length // window
    dilation = random.choice((1, 1, most, random.randint(1, most)))
    stride = random.choice((1, 1, window, random.randint(1, window)))
    return window, stride, dilation, random.random() < 0.25


def _case(random: Random, rank: int) -> Case:
    shape = tuple(random.choice(LENGTHS[rank]) for _ in range(rank))
    while prod(shape) > MAX_TOKENS:
        shape = tuple(random.choice(LENGTHS[rank]) for _ in range(rank))
    bias = random.random() < 0.35
    window, stride, dilation, causal = zip(*(_axis(random, length, bias) for length in shape), strict=True)
    heads = random.choice((1, 2, 3, 4))
    return Case(
        shape=shape,
        window=window,
        stride=stride,
        dilation=dilation,
        causal=causal,
        batch=random.choice((0, 1, 1, 1, 1, 1, 2, 2, 2, 3)),
        heads=heads,
        key_heads=random.choice([h for h in range(1, heads + 1) if heads % h == 0]),
        head_dim=random.choice(HEAD_DIMS),
        bias=bias,
        scale=random.choice((None, None, None, 0.2, 1.0, 0.0)),
        extra=random.choice((0, 0, 0, 1, 2, 5, 17)),
        layout=random.choice(LAYOUTS),
        seed=random.randrange(2**31),
    )


def cases(rank: int, n: int, seed: int) -> Iterator[Case]:
    """`n` random cases of one rank; the i-th depends on (rank, seed, i) only."""
    for i in range(n):
        yield _case(Random(f"{rank}/{seed}/{i}"), rank)


def _grids(case: Case, randn: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value in the memory layout of the case."""
    b, s, d = case.batch, case.shape, case.head_dim
    counts = (case.heads, case.key_heads, case.key_heads)
    if case.layout == "fused":
        return torch.split(randn(b, *s, sum(counts), d), counts, dim=-2)
    if case.layout == "heads_first":
        return tuple(randn(b, h, *s, d).movedim(1, -2) for h in counts)
    if case.layout == "channels_first":
        return tuple(randn(b, h, d, *s).movedim((1, 2), (-2, -1)) for h in counts)
    if case.layout == "expanded":  # stride 0 along the batch, the heads and the first spatial axis
        q, k, v = ([b, *s, h, d] for h in counts)
        q[0], k[-2], v[1] = min(b, 1), 1, 1
        return tuple(randn(*x).expand(b, *s, h, d) for x, h in zip((q, k, v), counts, strict=True))
    if case.layout == "offset":
        inner = (slice(None), *(slice(1, -1) for _ in s), slice(1, None), slice(1, None))
        return tuple(randn(b, *(n + 2 for n in s), h + 1, d + 1)[inner] for h in counts)
    return tuple(randn(b, *s, h, d) for h in counts)


def make_inputs(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Tensor | None]:
    """Tensor arguments by name, None where the case has none: leaves that require gradients, values set by the seed."""
    generator = torch.Generator().manual_seed(case.seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)

    tensors: dict[str, Tensor | None] = dict(zip(TENSORS, (*_grids(case, randn), None, None, None), strict=True))
    if case.bias:
        tensors["bias"] = randn(case.heads, *(2 * w - 1 for w in case.window))
    if case.extra:
        for name in ("extra_key", "extra_value"):
            tensors[name] = randn(case.batch, case.extra, case.key_heads, case.head_dim)
    return {name: None if x is None else x.detach().requires_grad_() for name, x in tensors.items()}


def as_dtype(inputs: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The same values as fresh leaves of another dtype."""
    return {name: None if x is None else x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}


def gradients(case: Case, inputs: dict[str, Tensor | None], out: Tensor, lse: Tensor) -> dict[str, Tensor]:
    """out, lse and, by the name of each input, its gradient for fixed random gradients of both out and lse."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(out.device) for x in (out, lse)]
    # What reaches the operator is rounded to half precision in the same way whatever the dtype of this run.
    cotangents = [g.bfloat16().to(x.dtype) for g, x in zip(cotangents, (out, lse), strict=True)]
    present = {name: x for name, x in inputs.items() if x is not None}
    grads = torch.autograd.grad((out, lse), tuple(present.values()), cotangents)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(present, grads, strict=True))}


def run(case: Case, inputs: dict[str, Tensor | None], impl: str, operator: Callable | None = None) -> dict[str, Tensor]:
    """Forward and backward of the public operator (or of `operator`, e.g. compiled): out, lse and every gradient."""
    operator = OPERATORS[case.rank] if operator is None else operator
    out, lse = operator(**inputs, **case.options, impl=impl)
    return gradients(case, inputs, out, lse)


def run_eager(case: Case, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Forward and backward of masked attention in which every step rounds to the dtype of the inputs."""
    dtype = inputs["query"].dtype

    def flat(x: Tensor) -> Tensor:  # [B, heads, T, d]
        return x.flatten(1, -3).transpose(1, 2).repeat_interleave(case.heads // x.shape[-2], dim=1)

    q, k, v = (flat(inputs[name]) for name in ("query", "key", "value"))
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    logits = q @ k.transpose(-1, -2) * scale
    if inputs["bias"] is not None:
        logits = logits + inputs["bias"].to(dtype).flatten(1)[:, geometry.relative_index(case.axes, q.device)]
    logits = logits.masked_fill(~geometry.mask(case.axes, q.device), float("-inf"))
    if inputs["extra_key"] is not None:
        logits = torch.cat([logits, q @ flat(inputs["extra_key"]).transpose(-1, -2) * scale], dim=-1)
        v = torch.cat([v, flat(inputs["extra_value"])], dim=2)
    out = (logits.softmax(-1) @ v).transpose(1, 2).unflatten(1, case.shape)
    lse = logits.to(torch.promote_types(dtype, torch.float32)).logsumexp(-1).transpose(1, 2).unflatten(1, case.shape)
    return gradients(case, inputs, out, lse)


def errors(
    case: Case,
    dtype: torch.dtype,
    impl: str,
    device: str | torch.device = "cpu",
    operator: Callable | None = None,
    inputs: dict[str, Tensor | None] | None = None,
) -> dict[str, tuple[float, float]]:
    """Largest absolute error against fp64, and the error allowed, of out, lse and every gradient.

    float64 may be off by 1e-11 and float32 by 1e-5, relative to the largest value. Half precision may have 1.5 times
    (gradients: twice) the error of the same computation done eagerly in that dtype, or of the exact result rounded to
    it where the eager computation is exact by luck.
    """
    inputs = make_inputs(case, dtype, device) if inputs is None else inputs
    got = run(case, inputs, impl, operator)
    exact = run(case, as_dtype(inputs, torch.float64), "reference")
    eager = run_eager(case, inputs) if dtype.itemsize < 4 else None

    def distance(x: Tensor, y: Tensor) -> float:
        assert x.shape == y.shape and x.device == y.device
        worst = (x.double() - y).abs().max().item() if x.numel() else 0.0
        return worst if worst == worst else float("inf")

    result = {}
    for name, truth in exact.items():
        if eager is None:
            largest = truth.abs().max().item() if truth.numel() else 0.0
            allowed = max(largest, 1.0) * (1e-11 if dtype == torch.float64 else 1e-5)
        else:
            yardstick = max(distance(eager[name], truth), distance(truth.to(got[name].dtype), truth))
            allowed = yardstick * (1.5 if name in ("out", "lse") else 2.0) + 1e-6
        result[name] = distance(got[name], truth), allowed
    return result


def check(case: Case, dtype: torch.dtype, impl: str, **kwargs) -> None:
    """Assert that `impl` keeps the error rule on this case, naming the case and everything that breaks it."""
    found = errors(case, dtype, impl, **kwargs)
    broken = {name: f"{error:.3g} > {allowed:.3g}" for name, (error, allowed) in found.items() if not error <= allowed}
    assert not broken, f"{impl} in {dtype} on {case!r}: {broken}"
