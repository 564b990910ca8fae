"""The Triton kernels of scored attention without a device."""

import kernel_checks
import pytest
import torch
from foveal.kernels.ops import explain, scored_attention
from foveal.kernels.scored import ColumnMask, CoPE, Landmark, LocalLinear, Parallax, Score, Softmax, configs
from foveal.kernels.scored.lists import pack, tile_lists, tile_states
from foveal.kernels.tools import compile_report
from scored_matrix import MASKS, Case, check, make_mask
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")


def test_interpreter():
    """Quick tests under `interpreter/`, in a process where Triton interprets its kernels."""
    kernel_checks.run_interpreter("test_scored_kernels.py")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["random", "masks", "not random and not masks"])
def test_interpreter_on_everything(part):
    kernel_checks.run_interpreter("test_scored_kernels.py", part, marker="slow")


@pytest.mark.parametrize("name", MASKS)
def test_lists_of_tiles(name):
    """Every visible pair lies in a listed tile, and every pair of a tile without a mask is visible."""
    queries, keys, rows, columns = 50, 37, 16, 8
    mask = make_mask(name, 2, 3, queries, keys, seed=0)
    visible = mask.visible(queries)
    states = tile_states(*pack(mask, queries), rows, columns)
    assert states.shape == (*visible.shape[:2], 4, 5) and (states[..., -1] < 2).all()
    wide = states.repeat_interleave(rows, 2).repeat_interleave(columns, 3)[:, :, :queries, :keys]
    assert not (visible & (wide == 0)).any() and visible[wide == 2].all()
    # as the mask itself decides, but for empty intervals and the last tile, which is cut short
    expected = mask.tiles(queries, rows, columns)
    assert ((states == expected) | (expected == 1))[..., :-1].all()
    lists = tile_lists(states)
    for row, found in zip(states.flatten(0, 2).tolist(), lists.flatten(0, 2).tolist(), strict=True):
        assert found[1 : 1 + found[0]] == [2 * i + (state == 1) for i, state in enumerate(row) if state]


def test_lists_of_a_causal_mask():
    states = tile_states(*pack(ColumnMask.causal(64), 64), 16, 16)[0, 0]
    assert torch.equal(states, torch.eye(4).to(torch.int8) + 2 * torch.ones(4, 4).tril(-1).to(torch.int8))
    assert tile_lists(states[None, None])[0, 0, :, 0].tolist() == [1, 2, 3, 4]


def test_far_intervals_are_kept():
    """Positions of 64 bits beyond 32 ones hide the same pairs."""
    start = torch.tensor([[[-(2**40), 3, 5, 4]]])
    mask = ColumnMask(start, torch.tensor([[[2, 2**40, 5, 2]]]))
    intervals, positions = pack(mask, 6)
    assert intervals.dtype == positions.dtype == torch.int32
    low, high = intervals[0, 0, :, None]
    assert torch.equal(~((positions[:, None] >= low) & (positions[:, None] < high)), mask.visible(6)[0, 0])


@pytest.mark.parametrize("kind", ["softplus", "power", "cope", "parallax"])
def test_the_matrix_knows_the_formulas(kind):
    """Its rounded computation, which sets the errors allowed in half precision, is that of the library."""
    check(Case((9,), kind, mask="random", length_scale=True), torch.bfloat16, "torch")


def test_auto_takes_the_kernels_on_a_device_and_says_why_not():
    with FakeTensorMode():
        q = torch.empty(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
        found = explain(scored_attention, q, q, q, score=Softmax())
        assert found.impl == "triton" and found.cost["logits_held_bytes"] == 0
        assert str(found.cost["kernel"]).startswith("softmax, keys read once")
        found = explain(scored_attention, q, q, q, score=CoPE(torch.empty(64, 16, device="cuda")))
        assert found.impl == "triton" and found.cost["logits_held_bytes"] == 2 * 4 * 2 * 64 * 2
        for score, why in (
            (LocalLinear(), "LocalLinear: every row has a covariance"),
            (Landmark(3), "Landmark: every section"),
            (Parallax(q.float()), "score.r.dtype=torch.float32 is not that of query"),
            (CoPE(torch.empty(64, 200, device="cuda")), "200 positions, more than 65"),
        ):
            found = explain(scored_attention, q, q, q, score=score)
            assert found.impl == "torch" and why in str(found.reasons["triton"])


def test_a_score_of_ones_own_is_not_taken_for_its_parent():
    class Sharp(Softmax):
        def attend(self, rows):
            return super().attend(rows._replace(scale=2 * rows.scale))

    with FakeTensorMode():
        q = torch.empty(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
        assert explain(scored_attention, q, q, q, score=Sharp()).impl == "torch"
    assert Score.unfused


@pytest.mark.parametrize("itemsize", [2, 4])
def test_backward_kernels_of_cope_share_their_tiles(itemsize):
    for device in ("hopper", "ampere", "ada", "amd", "rdna"):
        for head_dim in (16, 64, 128):
            sizes = dict(queries=500, keys=500, head_dim=head_dim, itemsize=itemsize, device=device, wide=False)
            query, key = (configs.choose(name, "cope", **sizes) for name in ("query", "key"))
            assert query[:2] == key[:2] and query.keys >= configs.COPE_KEYS[itemsize]


def test_kernels_compile_without_spills():
    """CoPE at head dim 32 in bfloat16; `test_every_pinned_size_keeps_the_rule` does others."""
    select = {"grid": {"cope"}, "head_dim": {32}, "dtype": {"bf16"}}
    rows = kernel_checks.check_report(operators=["scored"], architectures=["sm_90"], select=select)
    assert {row.kernel for row in rows} == {"forward", "query", "key"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", compile_report.ARCHITECTURES)
def test_every_pinned_size_keeps_the_rule(arch):
    kernel_checks.check_report(operators=["scored"], architectures=[arch], unspilled=kernel_checks.must_not_spill)
