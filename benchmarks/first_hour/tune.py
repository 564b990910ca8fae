"""Steps that time sizes of tiles against the shipped ones, and say which entry of a table would change."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import prod
from typing import Any, NamedTuple

import torch
from foveal.kernels import ops
from foveal.kernels.common.launching import Device, device_class
from foveal.kernels.common.operator import OPERATORS

from .. import clock, records
from ..benchmark import Call, SkippedError, WrongResultError
from ..runner import check_agreement
from .context import Context
from .plan import Finding

ROUNDS = 15
GAIN = 1.03  # times as fast as the shipped size that a candidate must be
SHIPPED = "shipped"


class Entry(NamedTuple):
    """An entry of a table of `configs`: sizes of a kernel up to a head dim, of elements of some bytes.

    `table` is "SIZES", or "WHOLE" of whole blocks in half precision, whose keys have no bytes.
    """

    kernel: str
    limit: int
    itemsize: int = 2
    table: str = "SIZES"

    def key(self, device: str) -> tuple:
        return (device, self.kernel) if self.table == "WHOLE" else (device, self.kernel, self.itemsize)


@dataclass(frozen=True)
class Question:
    """Which of some launches of an operator is the fastest on a case.

    Attributes:
        operator: name of the operator, whose `configs` holds the sizes.
        shape: `[B, *spatial, heads, head_dim]` of query, key and value.
        options: arguments of the public function that are no tensors.
        entry: the table's entry that candidates replace; None where they are parameters to force.
        candidates: fields of a `Size` as a tuple, or names and values of `configs.override`.
        backward: whether the kernels in question are those of the gradients.
        devices: tables of sizes that the candidates are meant for.
        public: name of the public function.
        mask: tokens of a block and blocks per list, of block-sparse attention.
    """

    operator: str
    shape: tuple[int, ...]
    options: Mapping[str, Any]
    entry: Entry | None
    candidates: tuple[tuple | Mapping[str, Any], ...]
    backward: bool = False
    devices: tuple[Device, ...] = ("hopper", "ampere", "ada", "amd", "rdna")
    dtype: torch.dtype = torch.bfloat16
    public: str = ""
    mask: tuple[tuple[int, ...], int] | None = None

    @property
    def mode(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def case(self) -> str:
        words = " ".join(f"{name}{value}" for name, value in self.options.items())
        block = f" block {self.mask[0]} list {self.mask[1]}" if self.mask else ""
        return f"{'x'.join(map(str, self.shape))} {words}{block}".replace(",", ".").replace("(", "").replace(")", "")

    def configs(self) -> Any:
        return import_module(f"{OPERATORS[self.operator].package}.configs")


def block_mask(question: Question, device: torch.device) -> ops.BlockMask:
    """Lists of blocks drawn without the same block twice."""
    block, most = question.mask or ((1,), 1)
    blocks = prod(-(-n // b) for n, b in zip(question.shape[1:-2], block, strict=True))
    generator = torch.Generator().manual_seed(0)
    idx = torch.rand(1, 1, blocks, blocks, generator=generator).argsort(-1)[..., :most].sort(-1).values.int()
    num = torch.full((1, 1, blocks), min(most, blocks), dtype=torch.int32)
    return ops.BlockMask(block, block, num.to(device), idx.to(device)).with_inverse(question.shape[1:-2])


@contextmanager
def replaced(table: dict, limit: int, value: Any) -> Iterator[None]:
    """Inside the block an entry of a table is another."""
    before = table[limit]
    table[limit] = value
    try:
        yield
    finally:
        table[limit] = before


def launches(question: Question, device: Device) -> dict[str, Callable]:
    """Context of every candidate by its label, of the shipped sizes first.

    Raises:
        SkippedError: the table has no such entry, or candidates are not meant for this device.
    """
    if device not in question.devices:
        raise SkippedError(f"no candidates are declared for the table {device!r}")
    configs = question.configs()
    made: dict[str, Callable] = {SHIPPED: configs.override}
    if question.entry is None:
        for fields in question.candidates:
            label = ", ".join(f"{name}={value}" for name, value in dict(fields).items())
            made[label] = partial(configs.override, **dict(fields))
        return made
    limit = question.entry.limit
    table = getattr(configs, question.entry.table).get(question.entry.key(device), {})
    if limit not in table:
        raise SkippedError(f"the table {device!r} has no sizes of {question.entry.kernel} up to head dim {limit}")
    several = isinstance(table[limit][0], tuple)
    kind = type(table[limit][0]) if several else type(table[limit])
    for fields in question.candidates:
        size = kind(*fields)
        if size not in (table[limit] if several else (table[limit],)) or several:
            made[str(size)] = partial(replaced, table, limit, (size,) if several else size)
    return made


def calls_of(question: Question, device: torch.device) -> Callable[[Callable], Call]:
    """A function that makes the call under a launch."""
    from ..operators import bind, randn  # with matplotlib, which other steps do without

    draw = randn(device, question.dtype)
    tensors = {name: draw(*question.shape) for name in ("query", "key", "value")}
    gradient = randn(device, question.dtype, seed=1)(*question.shape)
    options = dict(question.options)
    if question.mask is not None:
        options["mask"] = block_mask(question, device)
    function = partial(getattr(ops, question.public), **options, impl="triton")
    call = bind(function, question.mode, tensors, gradient)

    def under(launch: Callable) -> Call:
        def run() -> object:
            with launch():
                return call()

        return run

    return under


def answer(context: Context, question: Question) -> Finding:
    """Time the candidates in turns, each held to the result of the shipped sizes before."""
    device = device_class(context.device)
    made, under = launches(question, device), calls_of(question, context.device)
    calls: dict[str, Call] = {}
    finding, wrong, expected = Finding(), [], None
    for label, launch in made.items():
        call = under(launch)
        try:
            result = call()
            context.finish()
            if expected is None:
                expected = result
            else:
                check_agreement(result, expected, question.dtype)
            calls[label] = call
        except SkippedError as error:
            wrong.append(f"{label}: {error}")
        except Exception as error:  # a size may not fit; the others are still timed
            finding.notes.append(f"{label}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")
    if SHIPPED not in calls:
        raise WrongResultError(f"the shipped sizes do not run: {finding.notes}")
    rounds = 2 if context.tiny else ROUNDS
    metrics = list(clock.measure(calls, context.device, rounds))
    environment = records.environment(context.device, rounds)
    dtype = str(question.dtype).removeprefix("torch.")
    known = dict(kernel=f"{question.operator} sizes", mode=question.mode, case=question.case, dtype=dtype)
    rows = [records.Row(**known, **metric._asdict(), **environment) for metric in metrics]
    records.write(rows, context.folder / "sizes.csv")
    judge(question, device, rows, finding)
    if wrong:
        raise WrongResultError("candidates with other results:\n" + "\n".join(wrong))
    return finding


def judge(question: Question, device: str, rows: list[records.Row], finding: Finding) -> None:
    """Say in `finding` how fast candidates are, and which entry would change."""
    times = {row.provider: row for row in rows if row.metric == "time"}
    shipped = times[SHIPPED]
    for name, row in sorted(times.items(), key=lambda item: item[1].p50):
        finding.notes.append(f"{name}: {row.p50:.4g} ms, {shipped.p50 / row.p50:.2f} times as fast as shipped")
    best = min(times.values(), key=lambda row: row.p50)
    apart = best.band[1] < shipped.band[0]
    if best is shipped or shipped.p50 < GAIN * best.p50 or not apart:
        return
    where = f"kernels/{question.operator}/configs.py"
    entry = question.entry
    place = "" if entry is None else f" {entry.table}[{', '.join(map(json.dumps, entry.key(device)))}][{entry.limit}]"
    gain = f"{shipped.p50 / best.p50:.2f} times as fast on {question.case}, {question.mode}"
    finding.tables.append(f"{where}{place}: {best.provider} is {gain}")


VIDEO = ((1, 30, 48, 80, 24, 128), {"window": (18, 24, 24)})
DINAT = ((64, 56, 56, 2, 32), {"window": 7})
CLIP = (1, 32, 32, 48, 12)
SWIN = {"window": 7, "shift": 3}
na3d, na2d = partial(Question, "neighborhood", public="na3d"), partial(Question, "neighborhood", public="na2d")
window = partial(Question, "window", entry=None, backward=True, public="window_attention")
sparse = partial(Question, "block_sparse", options={}, public="block_sparse_attention")
linear = partial(Question, "linear", entry=None, backward=True, public="linear_attention")
FORWARD = ((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2))
KEY = ((32, 64, 4, 1), (64, 64, 8, 1), (64, 64, 8, 2), (32, 64, 4, 2))
SMALL = ((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 1, 2), (16, 32, 1, 2), (32, 64, 2, 2))
SMALL_QUERY = ((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 1, 1), (32, 32, 1, 2), (32, 32, 2, 2))
SMALL_KEY = ((64, 64, 4, 2), (32, 64, 4, 2), (32, 32, 1, 1), (32, 32, 2, 2), (32, 16, 1, 2))
NVIDIA: tuple[Device, ...] = ("hopper", "ampere", "ada")
E4M3 = ((128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3))
QUERY = ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2))
FORWARD_64 = ((128, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 2))
PASSES = ({"one_pass": True}, {"one_pass": False})
WHERE_IT_ENDS = "where the one-pass backward of windows ends"
QUESTIONS: dict[str, tuple[Question, str]] = {
    "forward 128 of neighborhoods": (
        na3d(*VIDEO, Entry("forward", 128), FORWARD),
        "the first size of the forward at head dim 128; three stages",
    ),
    "query 128 of neighborhoods": (
        na3d(*VIDEO, Entry("query", 128), QUERY, backward=True),
        "64 rows with four warps against 128 with eight",
    ),
    "key 128 of neighborhoods": (
        na3d(*VIDEO, Entry("key", 128), KEY, backward=True),
        "64 keys by 32 queries in one stage against 64 by 64 with eight warps",
    ),
    "forward 64 of neighborhoods": (
        na3d((1, 30, 48, 80, 12, 64), VIDEO[1], Entry("forward", 64), FORWARD_64),
        "the first size of the forward at head dim 64",
    ),
    "forward of small windows": (
        na2d(*DINAT, Entry("forward", 32), SMALL, devices=NVIDIA),
        "programs of one warp for windows of 7",
    ),
    "backward of small windows": (
        na2d(*DINAT, Entry("query", 32), SMALL_QUERY, backward=True, devices=NVIDIA),
        "programs of one or two warps for the query's gradient of windows of 7",
    ),
    "key gradient of small windows": (
        na2d(*DINAT, Entry("key", 32), SMALL_KEY, backward=True, devices=NVIDIA),
        "programs of one or two warps for the gradients of key and value of windows of 7",
    ),
    "descriptors of few tiles": (
        na2d(*DINAT, None, ({"descriptor": True}, {"descriptor": False}), devices=("hopper",)),
        "FEW_TILES and NARROW_HEAD",
    ),
    "e4m3 128 of neighborhoods": (
        na3d(VIDEO[0], VIDEO[1] | {"qk_dtype": torch.float8_e4m3fn}, Entry("forward", 128, 1), E4M3,
             devices=("hopper", "ada")),
        "stages of the forward of queries and keys in e4m3",
    ),
    "forward 128 of block lists": (
        sparse((*CLIP, 128), entry=Entry("forward", 128, table="WHOLE"), mask=((4, 4, 8), 48),
               candidates=((64, 64, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2))),
        "rows of the forward for blocks of 128 tokens",
    ),
    "backward 128 of block lists": (
        sparse((*CLIP, 128), entry=Entry("key", 128, table="WHOLE"), mask=((4, 4, 8), 48), backward=True,
               candidates=((64, 32, 4, 1), (64, 64, 8, 1), (64, 64, 4, 1))),
        "keys of a program of the backward for blocks of 128 tokens",
    ),
    "forward 64 of block lists": (
        sparse((*CLIP, 64), entry=Entry("forward", 64, table="WHOLE"), mask=((4, 4, 4), 96),
               candidates=((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3))),
        "stages and columns of the forward for blocks of 64 tokens",
    ),
    "passes of windows": (window((64, 56, 56, 3, 32), SWIN, candidates=PASSES), WHERE_IT_ENDS),
    "passes of windows, head dim 64": (window((64, 28, 28, 3, 64), SWIN, candidates=PASSES), WHERE_IT_ENDS),
    "chunks of linear attention": (
        linear((4, 256, 256, 3, 32), {"relu": True, "floor": 100.0},
               candidates=({"chunk": 256}, {"chunk": 512}, {"chunk": 1024})),
        "MIN_CHUNK of linear attention",
    ),
}  # fmt: skip
SIZES_OF_TINY = ((16, 16, 4, 1), (32, 32, 4, 1))
TINY = {
    "tiny sizes": (
        na2d((1, 6, 7, 1, 8), {"window": 3}, Entry("forward", 64, 4), SIZES_OF_TINY, dtype=torch.float32),
        "nothing: it shows that the step runs",
    )
}
