"""The contract of all masks: valid lists on ragged grids, the own block, dense at full budget, the density they state.

Every mask of the registry has a row in `ROWS`, every file of the shelf a mask in the registry.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from math import ceil, inf, prod
from pathlib import Path

import pytest
import torch
from foveal.kernels import masks
from foveal.kernels.block_sparse.mask import BlockMask, boxes
from foveal.kernels.masks.blocks import density, own_blocks
from foveal.kernels.masks.content_blocks import lay_out
from foveal.kernels.masks.table import markdown
from foveal.kernels.ops import block_sparse_attention
from mask_lists import kept
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

HEADS = 2
RAGGED = ((23,), (9, 11), (5, 6, 7))
ENTRIES = masks.REGISTRY
SHELF = Path(masks.__file__).parent
SHARED = {  # files without a mask
    "__init__", "blocks", "named", "orders", "plan", "registry", "search", "select", "table",
}  # fmt: skip
SYNCS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique2", "_unique2", "bincount")


@dataclass(frozen=True)
class Row:
    """How a mask is called in the tests.

    `full` are options at which everything is seen (None: the mask always leaves something out), `count` the fewest and
    most blocks that a row lists, of the number of blocks of keys.
    """

    options: dict = field(default_factory=dict)
    full: dict | None = None
    grids: tuple = RAGGED
    layout: str = "grid"  # of the tensors; "flat" is the grid flattened, "frames" flattened in space
    count: Callable[[int], tuple[int, int]] | None = None
    own: bool = True


def topk(number: int) -> Callable[[int], tuple[int, int]]:
    return lambda blocks: (min(number, blocks), min(number, blocks) + 1)


FIVE = {"block": 5}
ROWS = {
    "anchor": Row({"difference": 0.0, "query_block": 4, "key_block": 2}, {"difference": inf, "query_block": 4}),
    "bsa": Row({"block": 3, "mass": 0.4}, {"block": 3, "mass": 1.0}, count=lambda n: (1, n)),
    "clear": Row({"radius": 3, "block": 2}, {"radius": 99, "block": 2}),
    "content_blocks": Row({"block": 16}, {"block": 16, "band": 99}, ((5, 6, 7),), "flat", lambda n: (1, 1)),
    "dma": Row({"window": 7}, {"window": 999}, count=lambda n: (7, 7), own=False),  # keys are the same for all queries
    "duo": Row({"recent": 3, "sink": 1, "block": 2}, {"recent": 99, "block": 2}),
    "flexprefill": Row({"block": 3, "mass": 0.4}, {"block": 3, "mass": 1.0, "distance": 2.0, "least": 99}),
    "freeswim": Row({"half": (2,), "block": 2}, {"half": (None,), "block": 2}, grids=((23,),)),
    "grid_offsets": Row(
        {"stride": (None, 4), "offsets": ((0,), (0, 1))},
        {"stride": (None, 4), "offsets": ((0,), (0, 1, 2, 3))},
        grids=((9, 11),),
        count=lambda n: (9 * 5, 9 * 6),
    ),
    "hip": Row({"tokens": 16, "query_block": 8, "key_block": 2}, {"tokens": 512, "query_block": 8, "key_block": 2},
               ((5, 6, 7),), "flat", lambda n: (8, 8 + 5)),
    "longheads": Row({"topk": 3, "block": 4}, {"topk": 99, "block": 4}, count=lambda n: (min(3, n),) * 2),
    "moa": Row({"alpha": (10.0, 4.0), "beta": 0.1, "block": 4}, {"alpha": 9999.0, "block": 4}, layout="flat"),
    "moba": Row({"topk": 3, "block": 3}, {"topk": 99, "block": 3}, count=lambda n: (3, 3)),
    "nabla": Row({"block": 3, "mass": 0.4, "window": 1}, {"block": 3, "mass": 1.0}, count=lambda n: (1, n)),
    "nabla_prior": Row({"block": 2, "window": 3}, {"block": 2, "window": 99}),
    "paro": Row({"tokens": 4, "mass": 0.4}, {"tokens": 4, "mass": 1.0}),
    "power": Row({"block": 2}, {"block": 2, "local": 99}),
    "psa": Row({"query_block": 16, "key_block": 16, "tile": 8}, None, layout="flat", grids=((5, 6, 7),)),
    "radial": Row(
        {"block": 8, "decay": 0.3, "dense_from": 8},
        {"block": 8, "decay": 1e9, "dense_from": 1},
        layout="flat",
        grids=((6, 5, 5), (7, 4, 6)),
    ),
    "s2": Row({"heads": HEADS, "stride": (2,), "local": 2, "block": 2}, {"heads": HEADS, "stride": (1,), "block": 2},
              grids=((23,),)),
    "s2_causal": Row({"heads": HEADS, "stride": 3, "local": 2, "block": 4}, None, grids=((50,),)),
    "s2_relative": Row({"stride": 3, "local": 2, "block": 4}, {"stride": 1, "local": 1, "block": 4}, grids=((50,),)),
    "sale": Row({"threshold": 0.3, "query_block": 4, "key_block": 2},
                {"threshold": 0.0, "query_block": 4, "key_block": 2}),
    "sla": Row({"ratio": 0.3, "query_block": 4, "key_block": 3}, {"ratio": 1.0, "query_block": 4, "key_block": 3},
               count=lambda n: (max(1, int(0.3 * n)), n)),
    "sparge": Row(
        {"mass": 0.5, "query_block": 4, "key_block": 3, "similarity": -1.0, "short_kept": False},
        {"mass": 1.0, "query_block": 4, "key_block": 3, "similarity": -1.0},
    ),
    "sta": Row({"window": (3,), "tile": 2}, {"window": (99,), "tile": 2}, grids=((23,),), count=lambda n: (3, 3)),
    "svg": Row({"width": 1, "block": 4, "round_to": 1, "head": ("spatial", "temporal")},
               {"width": 6, "block": 4, "round_to": 1}, ((6, 25),), "frames"),
    "svg_online": Row({"width": 1, "block": 4, "round_to": 1}, {"width": 6, "block": 4, "round_to": 1},
                      ((6, 5, 5),), "frames"),
    "two_level": Row({"frames": 1, "topk": 2, "block": (2,)}, {"frames": 99, "topk": 99, "block": (2,)}, ((23,),)),
    "vmoba": Row({"threshold": 0.25, "block": 3}, {"topk": 99, "block": 3}, count=lambda n: (2, n)),
    "vsa": Row({"sparsity": 0.7, "block": 3}, {"sparsity": 0.0, "block": 3},
               count=lambda n: topk(max(1, ceil((1 - 0.7) * n)))(n)),
}  # fmt: skip
CASES = [
    pytest.param(name, grid, id=f"{name}-{'x'.join(map(str, grid))}")
    for name, row in ROWS.items()
    for grid in row.grids
]


def inputs(grid, row: Row):
    generator = torch.Generator().manual_seed(sum(grid))
    shape = {"grid": grid, "flat": (prod(grid),), "frames": (grid[0], prod(grid[1:]))}[row.layout]
    return [torch.randn(2, *shape, HEADS, 8, generator=generator, dtype=torch.float64) for _ in range(3)]


@dataclass(frozen=True)
class Made:
    """A mask with the tensors that it is a mask of, and how their output returns to the order of tokens."""

    mask: BlockMask
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    restore: Callable[[torch.Tensor], torch.Tensor] = torch.clone

    def attend(self) -> torch.Tensor:
        return self.restore(block_sparse_attention(self.query, self.key, self.value, mask=self.mask))


def make(name: str, grid, options: dict, tensors=None) -> Made:
    entry, row = ENTRIES[name], ROWS[name]
    query, key, value = inputs(grid, row) if tensors is None else tensors
    if not entry.dynamic:
        return Made(entry.function(grid, **options), query, key, value)
    if name == "dma":  # a key's bias is not of the options
        bias = value.flatten(1, -3)[..., 0].transpose(1, 2)
        return Made(entry.function(query, key, bias=bias, **options), query, key, value)
    if "value" not in signature(entry.function).parameters:
        return Made(entry.function(query, key, **options), query, key, value)
    found = entry.function(query, key, value, **options)
    if isinstance(found, BlockMask):
        return Made(found, query, key, value)
    if name == "psa":
        return Made(found[0], query, *found[1:])
    return Made(*found[:4], lambda x: lay_out(x, found[4]))


def test_every_file_of_the_shelf_has_a_mask_and_a_row():
    files = {path.stem for path in SHELF.glob("*.py")} - SHARED
    assert files == {entry.function.__module__.rsplit(".", 1)[1] for entry in ENTRIES.values()}
    assert ROWS.keys() == ENTRIES.keys()
    assert set(masks.__all__) >= ENTRIES.keys()


@pytest.mark.parametrize(("name", "grid"), CASES)
def test_lists_are_valid_and_say_what_they_promise(name, grid):
    row, entry = ROWS[name], ENTRIES[name]
    tensors = inputs(grid, row)
    made = make(name, grid, row.options, tensors)
    mask, shape, key_shape = made.mask, made.query.shape[1:-2], made.key.shape[1:-2]
    blocks = prod(boxes(key_shape, mask.key_block))
    assert mask.kv_idx.dtype == mask.kv_num.dtype == torch.int32
    assert mask.kv_idx.shape[2] == prod(boxes(shape, mask.query_block)) == mask.kv_num.shape[2]
    assert mask.kv_num.min() >= 1 and mask.kv_num.max() <= mask.kv_idx.shape[-1]
    assert mask.kv_idx.min() >= 0 and mask.kv_idx.max() < blocks
    listed = torch.arange(mask.kv_idx.shape[-1] - 1) < mask.kv_num[..., None] - 1
    assert (mask.kv_idx.diff(dim=-1)[listed] > 0).all(), "ascending, so each block once"
    if row.count is not None:
        low, high = row.count(blocks)
        assert low <= mask.kv_num.min() and mask.kv_num.max() <= high
    if row.own and shape == key_shape:
        own = own_blocks(shape, mask.query_block, mask.key_block)
        assert (kept(mask, blocks) | ~own).all(), "the own block is kept"
        assert (density(mask, shape) <= 1).all() and (density(mask, shape) > 0).all()
    again = make(name, grid, row.options, tensors).mask
    assert torch.equal(mask.kv_num, again.kv_num) and torch.equal(mask.kv_idx, again.kv_idx)
    assert torch.equal(made.attend(), made.attend()) and made.attend().isfinite().all()
    if entry.dynamic and mask.kv_idx.shape[1] == HEADS:  # heads and entries choose for themselves
        flip = make(name, grid, row.options, [x.flip(0, -2) for x in tensors]).mask
        assert torch.equal(kept(flip, blocks), kept(mask, blocks).flip(0, 1))


@pytest.mark.parametrize(("name", "grid"), [x for x in CASES if ROWS[x.values[0]].full is not None])
def test_a_full_budget_is_dense(name, grid):
    query, key, value = tensors = inputs(grid, ROWS[name])
    made = make(name, grid, ROWS[name].full, tensors)
    assert (made.mask.kv_num == prod(boxes(made.key.shape[1:-2], made.mask.key_block))).all()
    flat = [x.flatten(1, -3).transpose(1, 2) for x in (query, key, value)]
    bias = None if made.mask.bias is None else made.mask.bias[:, :, :1]
    dense = torch.nn.functional.scaled_dot_product_attention(*flat, attn_mask=bias).transpose(1, 2)
    torch.testing.assert_close(made.attend(), dense.reshape(query.shape), atol=1e-12, rtol=0)


def test_a_pyramid_of_single_tokens_is_dense():
    query, key, value = inputs((5, 6, 7), ROWS["psa"])
    mask, keys, values = masks.psa(query, key, value, ends={1: 1.0}, query_block=16, key_block=16, tile=8)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    out = block_sparse_attention(query, keys, values, mask=mask)
    torch.testing.assert_close(out, dense.transpose(1, 2), atol=1e-12, rtol=0)


class Sizes(TorchDispatchMode):
    """Keeps the size of the largest tensor."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


class NoWaiting(Sizes):
    """Refuses operators whose result depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in SYNCS, f"{func} waits for the device"
        return super().__torch_dispatch__(func, types, args, kwargs)


DYNAMIC = [name for name, entry in ENTRIES.items() if entry.dynamic]


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_masks_do_not_wait_and_trace(name):
    row = ROWS[name]
    grid = row.grids[-1]
    tensors = inputs(grid, row)
    with NoWaiting():
        mask = make(name, grid, row.options, tensors).mask
    for device in ("cpu", "cuda"):
        with FakeTensorMode():
            fake = make(name, grid, row.options, [torch.empty(x.shape, device=device) for x in tensors]).mask
        assert fake.kv_idx.shape == mask.kv_idx.shape and fake.kv_num.shape == mask.kv_num.shape
        assert fake.kv_idx.device.type == fake.kv_num.device.type == device


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_masks_take_half_precision_and_grouped_keys(name):
    row = ROWS[name]
    grid = row.grids[-1]
    query, key, value = (x.bfloat16() for x in inputs(grid, row))
    made = make(name, grid, row.options, (query, key, value))
    assert made.mask.kv_num.min() >= 1 and made.attend().isfinite().all()
    if name not in ("content_blocks", "dma"):  # a head of keys for each of queries; a bias for each head of keys
        shared = make(name, grid, row.options, (query, key[..., :1, :], value[..., :1, :])).mask
        alike = make(name, grid, row.options, (query, key[..., [0, 0], :], value[..., [0, 0], :])).mask
        assert torch.equal(shared.kv_idx, alike.kv_idx) and torch.equal(shared.kv_num, alike.kv_num)


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_masks_have_no_size_of_tokens_squared(name, monkeypatch):
    for module in ("hip", "psa", "sale"):  # logits that they hold at a time
        monkeypatch.setattr(sys.modules[f"foveal.kernels.masks.{module}"], "LOGITS", 1 << 20)
    row, grid, tokens = ROWS[name], (8, 16, 32), 4096
    shape = {"grid": grid, "flat": (tokens,), "frames": (8, 512)}[row.layout]
    tensors = [torch.randn(1, *shape, 1, 4) for _ in range(3)]
    block = 64 if len(shape) < 3 else 4
    blocks = {x: block for x in row.options if x.endswith("block")} | ({"tokens": 256} if name == "hip" else {})
    with NoWaiting() as mode:
        make(name, grid, {**row.options, **blocks}, tensors)
    assert mode.largest <= tokens**2 / 8


LONG = {  # one axis of very many tokens
    "clear": {"radius": 300},
    "duo": {"recent": 300, "sink": 64},
    "freeswim": {"half": (300,)},
    "grid_offsets": {"stride": (1024,)},
    "moa": {"alpha": 4096.0},
    "nabla_prior": {"window": 9},
    "power": {},
    "s2": {"heads": 4, "stride": 4},
    "s2_causal": {"heads": 4, "stride": 8, "local": 4},
    "s2_relative": {"stride": 8, "local": 4},
}


@pytest.mark.parametrize("name", LONG)
def test_static_masks_of_long_sequences_stay_small(name):
    with Sizes() as mode:
        masks.REGISTRY[name].function((1 << 17,), block=256, **LONG[name])
    assert mode.largest <= 8 * 512**2


@pytest.mark.slow
@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_masks_compile_in_one_graph(name):
    row = ROWS[name]
    grid = row.grids[-1]
    tensors = inputs(grid, row)
    torch.compiler.reset()
    eager = make(name, grid, row.options, tensors).mask
    compiled = torch.compile(lambda *x: make(name, grid, row.options, x).mask, fullgraph=True, backend="eager")
    compiled = compiled(*tensors)
    assert torch.equal(eager.kv_idx, compiled.kv_idx) and torch.equal(eager.kv_num, compiled.kv_num)


def test_the_page_of_masks_is_up_to_date():
    page = (Path(__file__).parents[2] / "docs" / "masks.md").read_text(encoding="utf-8")
    assert page == markdown(), "run: python -m foveal.kernels.masks.table docs/masks.md"
