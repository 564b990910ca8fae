"""The Triton kernels of neighborhood attention without a device."""

from math import prod
from random import Random

import kernel_checks
import pytest
import torch
from foveal.kernels.neighborhood import configs
from foveal.kernels.neighborhood.geometry import Axis, inverse_bounds, window_bounds
from foveal.kernels.tools import compile_report

pytest.importorskip("triton")


PARTS = ["random and [1-", "random and [2-", "random and [3-", "not random"]


def test_interpreter():
    """Quick tests under `interpreter/`, in a process where Triton interprets its kernels."""
    kernel_checks.run_interpreter("test_neighborhood_kernels.py")


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_interpreter_on_everything(part):
    kernel_checks.run_interpreter("test_neighborhood_kernels.py", part, marker="slow")


@pytest.mark.parametrize("kernel", ["forward", "query", "key"])
def test_descriptors_where_a_program_has_many_tiles(kernel):
    def addresses(window: int, descriptor: bool) -> bool:
        known: dict = dict(head_dim=32, itemsize=2, device="hopper", descriptor=descriptor, wide=False)
        return configs.choose(kernel, (Axis(56, window), Axis(56, window)), **known).descriptor

    assert [addresses(window, descriptor=True) for window in (7, 29)] == [False, True]
    assert not addresses(29, descriptor=False)


VIDEO = (Axis(30, 18), Axis(48, 24), Axis(80, 24))


@pytest.mark.parametrize("device", ["hopper", "ampere", "ada"])
@pytest.mark.parametrize("kernel", ["forward", "query", "key"])
def test_programs_of_one_warp_are_for_small_windows_of_narrow_heads(kernel, device):
    def warps(axes: tuple[Axis, ...], head_dim: int) -> int:
        known: dict = dict(itemsize=2, device=device, descriptor=False, wide=False)
        return configs.choose(kernel, axes, head_dim=head_dim, **known).warps

    assert [warps(axes, 32) for axes in ((Axis(56, 7),) * 2, VIDEO)] == [1, 4]
    assert warps((Axis(56, 7),) * 2, 64) == 4


def test_wide_heads_take_tiles_that_l2_can_feed(monkeypatch):
    """64 by 64 has fewer pairs that do not count, and asks L2 for twice as many bytes a pair."""
    known = (128, 2, "hopper")

    def cost(*tile: int) -> float:
        size = configs.Size(*tile)
        assert size in configs.SIZES["hopper", "forward", 2][128]
        return configs.shapes("forward", VIDEO, size, configs.tile_clocks("forward", size, *known))[0]

    small, large = (64, 64, 4, 2), (128, 128, 8, 2)
    assert cost(*small) > configs.SAME_COST * cost(*large)
    monkeypatch.setitem(configs.L2_BYTES, "hopper", 10**9)
    assert cost(*small) < configs.SAME_COST * cost(*large)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "query", "key"])
@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_estimated_clocks_are_near_those_that_are_counted(arch, kernel, monkeypatch):
    monkeypatch.setattr(configs, "L2_BYTES", dict.fromkeys(configs.L2_BYTES, 10**9))  # counts leave out memory
    device = compile_report.ARCHITECTURES[arch].device
    select: dict = {"kernel": {kernel}, "grid": {"7x7"}, "head_dim": {32, 64}, "dtype": {"bf16"}, "flags": {""}}
    rows = list(compile_report.loop_report(architectures=[arch], operators=["neighborhood"], select=select))
    for row in rows:
        queries, keys = (prod(map(int, tile.split("×"))) for tile in (row.queries, row.keys))
        size = configs.Size(queries, keys, row.warps, row.stages)
        counted = max(row.tensor, row.busy, (row.tensor + row.busy) / row.programs)
        assert 2 / 3 < configs.tile_clocks(kernel, size, row.head_dim, 2, device)[1] / counted < 3 / 2, row
    assert {row.warps for row in rows} >= {1, 4}


@pytest.mark.parametrize("inverse", [False, True])
def test_every_pair_of_a_visited_tile_has_its_entry_in_the_bias_table(inverse):
    """Kernels read entries of pairs that are not seen, too, also past the ends of the grid."""
    from foveal.kernels.neighborhood import launch

    random, bounds, least = Random(0), inverse_bounds if inverse else window_bounds, 10**6
    for _ in range(300):
        window = random.choice((1, 3, 5, 7, 11))
        n, stride = random.randint(window, 40), random.randint(1, window)
        axis = Axis(n, window, stride, 1, random.random() < 0.5)
        rows, columns = random.choice((1, 2, 4, 8, 16)), random.choice((1, 2, 4, 8, 16))
        known: dict = dict(warps=4, stages=1, descriptor=False, inner=True, border=True, wide=False)
        half = launch.table_lengths((axis,), configs.Config((1, 1, rows), (1, 1, columns), **known))[2] // 2
        for first in range(0, n, rows):
            low, _ = bounds(first, n, *axis[1:3], axis.causal)
            _, high = bounds(min(first + rows, n) - 1, n, *axis[1:3], axis.causal)
            last = low + -(-(high - low) // columns) * columns - 1
            least = min(least, half - (last - first), half - (first + rows - 1 - low))
    assert least == 0, "no pair outside, and none of the table for nothing"


def test_the_table_is_widened_around_its_middle():
    from foveal.kernels.neighborhood import launch

    bias = torch.randn(2, 3, 5)
    wide = launch.widen(bias, (1, 7, 11))
    assert wide.shape == (2, 7, 11) and torch.equal(wide[:, 2:5, 3:8], bias) and wide.count_nonzero() == 30
    assert torch.equal(launch.widen(bias, (1, 3, 5)), bias)


@pytest.mark.parametrize("most", [1, 4, 7, 11, 30, 100])
def test_launches_of_the_table_gradient_take_every_program_once_in_bounded_memory(most, monkeypatch):
    from foveal.kernels.neighborhood import launch

    axes, batch, heads, tiles, queries = (Axis(20, 3),), 3, 2, 5, (1, 1, 4)
    entries, stored, taken = 5, 3 * 4, []
    values = torch.randn(batch * heads * tiles, entries)

    def store(count, skip, pairs):
        assert len(pairs) >= count and pairs.shape[1] == stored and len(pairs) <= most
        taken.extend(range(skip, skip + count))

    class Sums:  # stands in for the kernel
        def __getitem__(self, grid):
            def run(pairs, partial, lengths, start, counts, skip, heads, **fixed):
                partial += values[skip : skip + grid[0]]

            return run

    monkeypatch.setattr(launch, "PAIR_BYTES", 4 * (stored + entries) * most)
    monkeypatch.setattr(launch, "table_kernel", Sums())
    found = launch.table_gradient(store, axes, torch.empty(heads, entries), batch, tiles, queries)
    assert taken == list(range(batch * heads * tiles))
    torch.testing.assert_close(found, values.view(batch, heads, tiles, entries).sum((0, 2)))


def check_report(**kwargs) -> None:
    for row in kernel_checks.check_report(operators=["neighborhood"], unspilled=kernel_checks.must_not_spill, **kwargs):
        if row.arch == "sm_90" and row.kernel in ("forward", "query", "key"):
            assert row.tma or (row.grid == "7x7" and row.head_dim == 32), row
            assert row.wgmma or row.dtype == "fp32" or row.head_dim == 256 or row.warps == 1, row


def test_kernels_compile_without_spills():
    """Head dim 64 with wholly visible tiles; `make rule` and `test_every_pinned_size_keeps_the_rule` do others."""
    select = {"grid": {"21x21"}, "head_dim": {64}, "dtype": {"bf16"}, "flags": {"bias, extra"}}
    select["kernel"] = {"query", "key", "table"}
    check_report(architectures=["sm_90"], select=select)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", compile_report.ARCHITECTURES)
def test_every_pinned_size_keeps_the_rule(arch):
    """All but float32 at head dim 256, whose rows alone fill the registers."""
    check_report(architectures=[arch])
