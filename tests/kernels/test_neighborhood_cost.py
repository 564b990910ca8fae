"""The cost model against explicit masks, against known tile counts, and against its own definitions."""

import random
import re
from itertools import product
from math import prod

import pytest
import torch
from foveal.kernels.neighborhood import cost, geometry, make_axes, simulator
from foveal.kernels.ops import na3d
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

CASES = [
    # shape, window, query tile, key tile, aligned, FLOP bound, tile bound, efficiency %, interior %
    ((56, 56), 7, (8, 8), (8, 8), True, 64, 6.7, 10, 0),
    ((56, 56), 7, (8, 8), (8, 8), False, 64, 12.2, 19, 0),
    ((56, 56), 7, (4, 4), (8, 8), True, 64, 14.2, 22, None),
    ((56, 56), 7, (4, 4), (8, 8), False, 64, 14.2, 22, None),
    ((200, 304), 7, (8, 8), (8, 8), True, 1241, 110, 9, None),
    ((200, 304), 7, (8, 8), (8, 8), False, 1241, 237.5, 19, None),
    ((256, 256), 80, (16, 8), (16, 8), True, 10.2, 7.5, 73, 50),
    ((256, 256), 80, (16, 8), (16, 8), False, 10.2, 8.3, 81, 64),
    ((256, 256), 80, (8, 8), (8, 8), True, 10.2, 9.0, 88, 76),
    ((256, 256), 80, (8, 8), (8, 8), False, 10.2, 9.0, 88, 76),
    ((30, 48, 80), (18, 24, 24), (2, 8, 8), (2, 8, 8), True, 11.1, 5.4, 49, 17),
    ((30, 48, 80), (18, 24, 24), (2, 8, 8), (2, 8, 8), False, 11.1, 6.9, 62, 34),
    ((30, 48, 80), (18, 24, 24), (4, 4, 4), (4, 4, 4), True, 11.1, 7.2, 65, 45),
    ((30, 48, 80), (18, 24, 24), (4, 4, 4), (4, 4, 4), False, 11.1, 7.4, 66, 45),
    ((8, 28, 28), (3, 7, 7), (1, 8, 8), (1, 8, 8), True, 42.7, 4.0, 9, None),
    ((8, 28, 28), (3, 7, 7), (1, 8, 8), (1, 8, 8), False, 42.7, 8.2, 19, None),
]
DILATED = [((7, 7), True, 64, 100), ((7, 7), False, 64, 100), ((8, 8), True, 37.5, 59), ((8, 8), False, 37.5, 59)]


def as_shown(value: float, shown: float) -> bool:
    """Whether `value` rounds to the printed number."""
    digits = len(str(shown).partition(".")[2])
    return round(value, digits) == shown


@pytest.mark.parametrize("shape, window, rows, columns, aligned, flop_bound, bound, efficiency, interior", CASES)
def test_tile_counts_of_known_cases(shape, window, rows, columns, aligned, flop_bound, bound, efficiency, interior):
    axes = make_axes(shape, window=window)
    tiling = simulator.simulate(axes, rows, columns, aligned=aligned)
    assert as_shown(prod(shape) ** 2 / cost.visible_pairs(axes), flop_bound)
    assert as_shown(tiling.speedup_bound, bound)
    assert as_shown(100 * tiling.efficiency, efficiency)
    assert interior is None or as_shown(100 * tiling.interior_share, interior)


@pytest.mark.parametrize(
    "shapes, window, tile",
    [
        ([(side, side) for side in (64, 128, 256, 512)], 16, (8, 8)),
        ([(side, side) for side in (64, 128, 256, 512)], 7, (8, 16)),
        ([(4, 32, 32), (8, 45, 45), (16, 64, 64), (64, 64, 64)], (3, 7, 7), (2, 8, 8)),
    ],
    ids=["2d, window 16", "2d, window 7", "3d"],
)
def test_cost_grows_linearly_from_4k_to_256k_tokens(shapes, window, tile):
    """With a fixed window: the exponent of tokens in what counts, what moves and what kernels compute is one."""
    tokens = torch.tensor([float(prod(shape)) for shape in shapes]).log()
    assert (prod(shapes[0]), prod(shapes[-1])) == (4096, 262144)
    sizes, grids = {"batch": 1, "heads": 8, "head_dim": 64}, [make_axes(shape, window=window) for shape in shapes]
    costs = {
        "forward FLOPs": [cost.forward_flops(axes, **sizes) for axes in grids],
        "backward FLOPs": [cost.backward_flops(axes, **sizes) for axes in grids],
        "forward bytes": [cost.forward_bytes(axes, **sizes, itemsize=2) for axes in grids],
        "backward bytes": [cost.backward_bytes(axes, **sizes, itemsize=2) for axes in grids],
        "tiles": [simulator.simulate(axes, tile, tile).visited for axes in grids],
    }
    for name, values in costs.items():
        logs = torch.tensor([float(value) for value in values]).log()
        covariance = torch.cov(torch.stack([tokens, logs]))
        exponent = float(covariance[0, 1] / covariance[0, 0])
        # windows at a border touch fewer tiles, and small grids have more border
        assert exponent == pytest.approx(1, abs=0.05 if name == "tiles" else 0.02), (name, exponent)


@pytest.mark.parametrize("tile, aligned, bound, efficiency", DILATED)
def test_tile_counts_of_dilation_groups(tile, aligned, bound, efficiency):
    tiling = simulator.simulate(make_axes((56, 56), window=7, dilation=8), tile, tile, aligned=aligned)
    assert as_shown(tiling.speedup_bound, bound) and as_shown(100 * tiling.efficiency, efficiency)


def random_axes(rng: random.Random, rank: int, longest: int) -> tuple[geometry.Axis, ...]:
    axes = []
    for _ in range(rank):
        length = rng.randint(1, longest)
        dilation = rng.randint(1, min(4, length))
        window = rng.randint(1, length // dilation)
        axes.append(geometry.Axis(length, window, rng.randint(1, window), dilation, rng.random() < 0.3))
    return tuple(axes)


def counted_by_mask(axes, rows, columns, aligned, inverse) -> tuple[int, int, int]:
    """Row tiles, visited and interior tile pairs, from the mask of the whole grid, one tile at a time."""
    shape = [axis.length for axis in axes]
    mask = geometry.mask(axes).reshape(*shape, *shape)  # [*query, *key]
    if inverse:
        mask = mask.permute(*range(len(shape), 2 * len(shape)), *range(len(shape)))
    row_tiles = visited = interior = 0
    for group in product(*(range(axis.dilation) for axis in axes)):
        every = tuple(slice(g, None, axis.dilation) for g, axis in zip(group, axes, strict=True))
        grouped = mask[every + every]  # one dense problem
        lengths = grouped.shape[: len(axes)]
        for first in product(*(range(0, n, t) for n, t in zip(lengths, rows, strict=True))):
            tile = grouped[tuple(slice(f, f + t) for f, t in zip(first, rows, strict=True))].flatten(0, len(axes) - 1)
            seen = tile.any(0).nonzero()  # columns that some row sees
            starts = seen.amin(0).tolist()
            if aligned:
                starts = [s // c * c for s, c in zip(starts, columns, strict=True)]
            row_tiles += 1
            ends = (seen.amax(0) + 1).tolist()
            for corner in product(*(range(s, e, c) for s, e, c in zip(starts, ends, columns, strict=True))):
                visited += 1
                box = tile[(slice(None), *(slice(k, k + c) for k, c in zip(corner, columns, strict=True)))]
                interior += bool(box.all()) and tuple(box.shape[1:]) == columns
    return row_tiles, visited, interior


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("rank, longest, repeats", [(1, 40, 60), (2, 14, 30), (3, 7, 12)])
def test_tile_counts_equal_those_of_the_mask(rank, longest, repeats, aligned, inverse):
    rng = random.Random(rank)
    for _ in range(repeats):
        axes = random_axes(rng, rank, longest)
        rows, columns = (tuple(rng.choice((1, 2, 3, 4, 8)) for _ in axes) for _ in range(2))
        tiling = simulator.simulate(axes, rows, columns, aligned=aligned, inverse=inverse)
        expected = counted_by_mask(axes, rows, columns, aligned, inverse)
        assert (tiling.row_tiles, tiling.visited, tiling.interior) == expected, (axes, rows, columns)
        assert tiling.pairs == int(geometry.mask(axes).sum()) <= tiling.computed


def test_pairs_equal_those_of_the_mask():
    rng = random.Random(0)
    for rank, longest in ((1, 60), (2, 12), (3, 6)) * 20:
        axes = random_axes(rng, rank, longest)
        tokens = prod(axis.length for axis in axes)
        visible = int(geometry.mask(axes).sum())
        assert cost.visible_pairs(axes) == geometry.visible_pairs(axes) == visible
        assert cost.visible_pairs(axes, extra=5) == visible + 5 * tokens


def test_flops_equal_those_of_dense_attention_when_the_window_is_the_grid():
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    axes = make_axes((6, 7), window=(6, 7))
    qkv, sizes = (3, 4, 42, 16), {"batch": 3, "heads": 4, "head_dim": 16}
    assert cost.forward_flops(axes, **sizes) == sdpa_flop_count(qkv, qkv, qkv)
    assert cost.backward_flops(axes, **sizes) == sdpa_backward_flop_count(qkv, qkv, qkv, qkv)


def test_extra_keys_add_a_dense_strip_of_tiles():
    axes = make_axes((56, 56), window=7)
    without = simulator.simulate(axes, (8, 8), (8, 8))
    with_text = simulator.simulate(axes, (8, 8), (8, 8), extra=77)
    assert with_text.visited - without.visited == 2 * without.row_tiles
    assert with_text.interior - without.interior == 1 * without.row_tiles
    assert with_text.pairs - without.pairs == 56 * 56 * 77


def test_bytes_count_every_operand_once():
    axes = make_axes((5, 6), window=3)
    b, heads, key_heads, d, extra, itemsize = 2, 4, 2, 8, 3, 2
    query = torch.empty(b, 5, 6, heads, d, dtype=torch.bfloat16).nbytes
    key = torch.empty(b, 5, 6, key_heads, d, dtype=torch.bfloat16).nbytes
    more = torch.empty(b, extra, key_heads, d, dtype=torch.bfloat16).nbytes
    lse = torch.empty(b, 5, 6, heads).nbytes
    table = torch.empty(heads, 5, 5).nbytes
    sizes = {"batch": b, "heads": heads, "key_heads": key_heads, "head_dim": d, "itemsize": itemsize}
    forward = cost.forward_bytes(axes, **sizes, extra=extra, bias=True)
    backward = cost.backward_bytes(axes, **sizes, extra=extra, bias=True)
    assert forward == 2 * query + 2 * (key + more) + lse + table
    assert backward == 4 * query + 4 * (key + more) + lse + 2 * table


def test_ranked_tiles_are_the_best_of_all():
    axes = make_axes((30, 48, 80), window=(18, 24, 24), stride=(16, 8, 8))
    ranked = simulator.rank_tiles(axes, row_tokens=32, column_tokens=16)
    assert len(ranked) == 21 * 15  # ways to write 2^5 and 2^4 as three powers of two
    assert [t.visited for t in ranked] == sorted(t.visited for t in ranked)
    assert all(prod(t.rows) == 32 and prod(t.columns) == 16 for t in ranked)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda axes: simulator.simulate(axes, (8,), (8, 8)), "rows=(8,)"),
        (lambda axes: simulator.simulate(axes, (8, 8), (8, 0)), "columns=(8, 0)"),
        (lambda axes: simulator.simulate(axes, (8, 8), (8, 8), inverse=True, extra=4), "extra=4"),
        (lambda axes: simulator.rank_tiles(axes, row_tokens=48), "row_tokens=48"),
    ],
)
def test_wrong_tiles_are_refused(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call(make_axes((16, 16), window=5))


def test_command_prints_the_table(capsys):
    simulator.main(["--shape", "256", "256", "--window", "80", "--query-tile", "16", "8", "--heads", "24"])
    printed = capsys.readouterr().out
    assert "10.24×" in printed and "16×8" in printed and "64%" in printed and "8.3×" in printed


def test_command_refuses_a_window_longer_than_the_axis(capsys):
    with pytest.raises(SystemExit):
        simulator.main(["--shape", "8", "--window", "9"])
    assert "window=9 on axis 0" in capsys.readouterr().err


def test_flop_counter_sees_the_kernels_without_a_device():
    pytest.importorskip("triton")
    axes = make_axes((30, 48, 80), window=(18, 24, 24), stride=(16, 8, 8))
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        query = torch.empty(2, 30, 48, 80, 4, 64, device="cuda", dtype=torch.bfloat16)
        key = torch.empty(2, 30, 48, 80, 2, 64, device="cuda", dtype=torch.bfloat16)
        text = torch.empty(2, 77, 2, 64, device="cuda", dtype=torch.bfloat16)
        na3d(query, key, key, window=(18, 24, 24), stride=(16, 8, 8), additional_keys=text, additional_values=text)
    assert counter.get_total_flops() == cost.forward_flops(axes, batch=2, heads=4, head_dim=64, extra=77)
