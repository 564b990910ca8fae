"""Neighborhood attention over two to four processes on CPU (gloo) against one process with the whole grid."""

from collections import Counter
from dataclasses import replace
from itertools import accumulate, pairwise
from random import Random

import pytest
import torch
from foveal.kernels.neighborhood import geometry, make_axes
from foveal.kernels.neighborhood.sharded_cost import main as print_costs
from foveal.kernels.neighborhood.sharded_cost import sharded_cost
from foveal.kernels.neighborhood.shards import LEAST_INTERIOR, interior, make_shards, split_evenly
from foveal.kernels.ops import sharded_neighborhood_attention
from neighborhood_matrix import OPERATORS, Case, cases, make_inputs
from sharded_ranks import SPLIT, Ranks, cotangents, gradients, make_step, piece

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
    pytest.mark.xdist_group("ranks"),  # three processes, which begin once
]
CLIP = Case(
    shape=(5, 6, 7),
    window=(3, 4, 3),
    stride=(2, 1, 1),
    dilation=(1, 1, 2),
    causal=(True, False, False),
    heads=4,
    key_heads=2,
    extra=3,
)

LONG = Case(shape=(30, 3), window=(5, 3), stride=(1, 1), dilation=(1, 1), causal=(False, False))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    processes = Ranks(3, tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.close()


def expected(case: Case, leaves: tuple[str, ...] | None = None) -> dict[str, torch.Tensor]:
    inputs = make_inputs(case, torch.float64)
    if leaves is not None:
        inputs = {name: x if x is None else x.requires_grad_(name in leaves) for name, x in inputs.items()}
    outputs = OPERATORS[case.rank](**inputs, **case.options)
    return gradients(inputs, outputs, cotangents(case))


def assert_equals_one_process(found: list[dict], case: Case, axis: int, leaves=None) -> None:
    """Pieces joined along the axis; of what every rank has, the gradients summed."""
    for name, truth in expected(case, leaves).items():
        pieces = [result[name] for result in found]
        got = torch.cat(pieces, 1 + axis) if name in ("out", "lse", *SPLIT) else sum(pieces)
        scale = truth.abs().max().clamp(min=1) if truth.numel() else 1
        torch.testing.assert_close(got / scale, truth / scale, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def random_split(case: Case, size: int, random: Random) -> tuple[int, tuple[int, ...]] | None:
    """An axis and the lengths of its pieces, all legal values possible; None where no axis is long enough."""
    axes = [i for i, length in enumerate(case.shape) if length >= size]
    if not axes:
        return None
    axis = random.choice(axes)
    cuts = [0, *sorted(random.sample(range(1, case.shape[axis]), size - 1)), case.shape[axis]]
    return axis, tuple(b - a for a, b in pairwise(cuts))


def sharded_cases(rank: int, size: int, count: int) -> list[tuple[Case, int, tuple[int, ...]]]:
    """On every other one a rank attends to some queries while tokens travel."""
    random, chosen = Random(f"{rank}/{size}"), []
    for case in cases(rank, 10**6, seed=11):
        if not case.batch or (split := random_split(case, size, random)) is None:
            continue
        axis, lengths = split
        if len(chosen) % 2 == 0 or any(len(s.parts) > 1 for s in make_shards(case.axes[axis], lengths)):
            chosen.append((case, *split))
        if len(chosen) == count:
            return chosen
    raise AssertionError("cases are endless")


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("rank", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_random_cases(ranks, rank, size):
    for i, (case, axis, lengths) in enumerate(sharded_cases(rank, size, 16)):
        impl = "reference" if i % 5 == 4 else "auto"
        assert_equals_one_process(ranks("attend", case, axis, lengths, i % 2 == 0, impl, size=size), case, axis)


def test_random_cases_hold_what_is_hard():
    """Ranks that need tokens from beyond a neighbour, that need or give none, whose windows see both sides; pieces
    shorter than a dilation; tokens that nobody sends; calls before and after the interior."""
    drawn = [s for rank in (1, 2, 3) for size in (2, 3) for s in sharded_cases(rank, size, 16)]
    count = Counter()
    for case, axis, lengths in drawn:
        shards = make_shards(case.axes[axis], lengths)
        count["short"] += min(lengths) < case.dilation[axis]
        count["no token travels"] += not any(shard.border for shard in shards)
        for rank, shard in enumerate(shards):
            count["far"] += any(n for i, n in enumerate(shard.receive) if abs(i - rank) > 1)
            count["margin"] += any(part.margin for part in shard.border)
            count["partial"] += 0 < sum(shard.receive) < sum(lengths) - lengths[rank]
            count["gives only"] += sum(shard.sent) > 0 == sum(shard.receive)
            count["neither"] += any(s.border for s in shards) and sum(shard.sent) == sum(shard.receive) == 0
            count["three calls"] += len(shard.parts) == 3
            count["two calls"] += len(shard.parts) == 2
            count["no interior"] += shard.interior is None
            count["both sides"] += any(min(b - a for a, b in (p.lower, p.upper)) > 0 for p in shard.border)
    assert all(count[what] >= 3 for what in count) and count.total() > 300, count
    assert {axis for _, axis, _ in drawn} == {0, 1, 2} and any(case.bias for case, _, _ in drawn)


def test_windows_per_head_values_of_their_own_width_and_masked_extra_keys(ranks):
    """Heads whose windows end where pieces do send nothing, others do."""
    windows = ((3, 4, 3), (1, 4, 3), (3, 4, 3), (5, 2, 3))
    case = replace(CLIP, window=windows, stride=1, key_heads=4, value_dim=6, additional_mask="lengths", batch=2)
    for leaves in (None, ("value",)):
        found = ranks("attend", case, 0, (2, 1, 2), True, "auto", torch.float64, leaves)
        assert_equals_one_process(found, case, 0, leaves)


@pytest.mark.parametrize("leaves", [("query",), ("key", "additional_keys"), ("value",)])
def test_some_gradients(ranks, leaves):
    found = ranks("attend", CLIP, 1, (2, 3, 1), True, "auto", torch.float64, leaves)
    assert all(set(of_rank) == {"out", "lse", *leaves} for of_rank in found)
    assert_equals_one_process(found, CLIP, 1, leaves)


def test_calls_side_by_side(ranks):
    """Ranks with and without a border exchange gradients of two independent calls in the same order."""
    calls = LONG, replace(LONG, window=(9, 3), causal=(True, False))
    inputs = make_inputs(LONG, torch.float64)
    outputs = [OPERATORS[2](**inputs, **case.options) for case in calls]
    truth = gradients(inputs, [sum(x) for x in zip(*outputs, strict=True)], cotangents(LONG))
    found = ranks("attend_twice", calls, 0, (10, 10, 10))
    for name in SPLIT:
        got = torch.cat([x[name] for x in found], 1)
        torch.testing.assert_close(got, truth[name], rtol=0, atol=1e-12)


def test_checkpoints_leave_nothing_on_its_way(ranks):
    """The first rank sends and has no border: recomputing stops early unless something is saved after the exchange."""
    case = replace(LONG, causal=(True, False))
    found = ranks("attend_checkpointed", case, 0, (10, 10, 10))
    assert_equals_one_process([gradients for gradients, _ in found], case, 0)
    assert [waiting for _, waiting in found] == [0, 0, 0]


@pytest.mark.parametrize("name", ["query", "value"])
def test_a_gradient_of_one_input_leaves_nothing_on_its_way(ranks, name):
    found = ranks("attend_for", LONG, 0, (10, 10, 10), name)
    assert_equals_one_process([gradients for gradients, _ in found], LONG, 0, (name,))
    assert [waiting for _, waiting in found] == [0, 0, 0]


def test_anomaly_detection_sees_what_arrived(ranks):
    assert_equals_one_process(ranks("attend_with_anomaly_detection", LONG, 0, (9, 12, 9)), LONG, 0)


def test_queries_that_see_own_tokens_are_attended_while_others_travel(ranks, tmp_path):
    """Nothing arrives before the rank in the middle waits: the others send when it does, in either direction."""
    _, (forward, backward), _ = ranks("overlap", LONG, 0, (9, 12, 9), tmp_path)
    assert forward == ["send", "attend", "wait", "attend"]
    assert backward == ["attend", "send", "attend", "wait"]


def test_interior_is_what_needs_no_other_rank():
    """Its crop lies in the piece; a block more on either side would not, or the rest of the piece where that is less.
    Parts are all queries, in order, and what they read adds up to their axes."""
    random, found = Random(0), 0
    for case in cases(1, 1500, seed=5):
        (axis,) = case.axes
        first, last = sorted(random.sample(range(axis.length + 1), 2))
        block = axis.stride * axis.dilation
        start, stop = interior(axis, (first, last))

        def fits(start: int, stop: int, axis=axis, first=first, last=last) -> bool:
            begin, cropped = geometry.crop(axis._replace(queries=(start, stop)))
            return first <= begin and begin + cropped.length <= last

        if start == stop:
            blocks = range(-(-first // block) * block, last - block + 1, block)
            assert not any(fits(i, i + block) for i in blocks), (axis, first, last)
            continue
        found += 1
        assert fits(start, stop)
        assert start == first or not fits(max(start - block, first), stop)
        assert stop == last or not fits(start, min(stop + block, last))
    assert found > 300


def test_parts_are_all_queries_and_fill_their_axes():
    for case, axis, lengths in (s for size in (2, 3) for s in sharded_cases(1, size, 40)):
        whole, edges = case.axes[axis], [0, *accumulate(lengths)]
        for start, shard, length in zip(edges, make_shards(whole, lengths), lengths, strict=False):
            cuts = [part.queries for part in shard.parts]
            assert [i for cut in cuts for i in range(*cut)] == list(range(length))
            for i, part in enumerate(shard.parts):
                read = part.margin + sum(b - a for a, b in (part.lower, part.own, part.upper))
                assert read <= part.axis.length
                if i == shard.interior:
                    assert part.margin == 0 and read == part.axis.length == part.own[1] - part.own[0]
                    assert part.queries[1] - part.queries[0] >= length * LEAST_INTERIOR
                pairs = geometry.axis_pairs(whole._replace(queries=tuple(start + q for q in part.queries)))
                assert geometry.axis_pairs(part.axis) == pairs


def test_few_queries_of_the_interior_do_not_get_a_call_of_their_own():
    lengths, axis = (20, 20, 20), geometry.Axis(60, 15)
    assert interior(axis, (20, 40)) == (27, 33) and len(make_shards(axis, lengths)[1].parts) == 3
    axis = axis._replace(window=17)
    assert interior(axis, (20, 40)) == (28, 32) and len(make_shards(axis, lengths)[1].parts) == 1


def test_blocks_that_end_where_pieces_do_need_no_exchange(ranks):
    """One rank calls without the others."""
    case = replace(LONG, stride=(5, 1))
    (found,) = ranks("attend", case, 0, (10, 15, 5), True, "auto", size=1)
    torch.testing.assert_close(found["out"], expected(case)["out"][:, :10], rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 5, 12, 17])
def test_a_cropped_axis_shows_its_queries_what_the_whole_axis_shows(length):
    for dilation in range(1, length + 1):
        for window in range(1, length // dilation + 1):
            for stride in range(1, window + 1):
                for causal in (False, True):
                    axis = geometry.Axis(length, window, stride, dilation, causal)
                    whole = geometry.axis_mask(axis)
                    for start in range(0, length, 2):
                        stop = min(start + 1 + (window + start) % 4, length)
                        part = axis._replace(queries=(start, stop))
                        first, cropped = geometry.crop(part)
                        seen = whole[start:stop].any(0).nonzero().flatten()
                        assert geometry.key_range(part) == (seen[0], seen[-1] + 1)
                        shown = whole[start:stop, first : first + cropped.length]
                        assert torch.equal(geometry.axis_mask(cropped), shown), (part, cropped)
                        assert geometry.axis_pairs(cropped) == whole[start:stop].sum()


SPLITS = ((CLIP, 1, (2, 3, 1)), (LONG, 0, (9, 12, 9)))


@pytest.mark.parametrize(("case", "axis", "lengths"), SPLITS, ids=["clip", "long"])
def test_repeats_bitwise(ranks, case, axis, lengths):
    first, second = (ranks("attend", case, axis, lengths, True, "auto", torch.float32) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("case", "axis", "lengths"), SPLITS, ids=["clip", "long"])
def test_half_precision_travels_as_it_is(ranks, case, axis, lengths):
    """Every rank computes what one process computes of its piece, but for the order in which tiles add, and the
    rounding of gradients that a rank adds to its own."""
    inputs = make_inputs(case, torch.bfloat16)
    outputs = OPERATORS[case.rank](**inputs, **case.options)
    whole = gradients(inputs, outputs, tuple(x.to(y.dtype) for x, y in zip(cotangents(case), outputs, strict=True)))
    found = ranks("attend", case, axis, lengths, True, "auto", torch.bfloat16)
    assert all(x.dtype == torch.bfloat16 for of_rank in found for name, x in of_rank.items() if name != "lse")
    for rank, of_rank in enumerate(found):
        torch.testing.assert_close(of_rank["out"], piece(outputs[0], axis, lengths, rank), rtol=2**-7, atol=2**-8)
    exact = expected(case)
    for name in SPLIT:
        one, several = whole[name] - exact[name], torch.cat([x[name] for x in found], 1 + axis) - exact[name]
        assert several.norm() < 1.5 * one.norm(), name


def test_meshes_of_one_dimension(ranks):
    lengths = (2, 2, 1)
    for rank, (line, row, (kind, message)) in enumerate(ranks("attend_on_meshes", CLIP, 0, lengths)):
        torch.testing.assert_close(line, piece(expected(CLIP)["out"], 0, lengths, rank), rtol=0, atol=1e-12)
        assert torch.equal(line, row)
        assert kind == "ValueError" and "must have one dimension" in message


def test_flat_pieces(ranks):
    for agreed, told, (out, lse) in ranks("attend_flat", CLIP, 0, (2, 2, 1)):
        assert all(
            torch.equal(x[0], out.flatten(1, 3)) and torch.equal(x[1], lse.flatten(1, 3)) for x in (agreed, told)
        )


@pytest.mark.parametrize("impl", ["reference", pytest.param("torch", marks=pytest.mark.slow)])
def test_compiled_whole(ranks, impl):
    found = ranks("attend_compiled", LONG, 0, (14, 16), impl, size=2)
    assert_equals_one_process([gradients for gradients, _ in found], LONG, 0)
    if impl == "reference":  # the other is one operator
        for _, (forward, backward) in found:
            assert forward == ["send", "attend", "wait", "attend"]
            assert backward == ["attend", "send", "attend", "wait"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_beside_data_parallelism(tmp_path, how):
    """The gradients that the mean over two pairs of ranks leaves are those of the whole batch."""
    ranks = Ranks(4, tmp_path)
    found = ranks("train", how)
    ranks.close()
    model, clips = make_step()
    model(clips).square().mean().backward()
    for name, parameter in model.named_parameters():
        for of_rank in found:
            torch.testing.assert_close(of_rank[name], parameter.grad, rtol=1e-10, atol=1e-14)


SAME_ON_EVERY_RANK = {
    "window over the whole grid": ({"window": (9, 3)}, "ValueError", "window=9 on axis 0 must not exceed its length 8"),
    "axis": ({"axis": 2}, "ValueError", "axis=2 must be one of the spatial axes 0 to 1"),
    "negative axis": ({"axis": -1}, "ValueError", "axis=-1"),
    "axis of another kind": ({"axis": "time"}, "ValueError", "axis='time'"),
    "spatial axes": ({"shape": (1, 2, 2, 2, 2, 2, 4)}, "ValueError", "expected [B, 1 to 3 spatial axes"),
    "stride": ({"stride": 4}, "ValueError", "stride=4 on axis 0 must lie in [1, window=3]"),
    "lengths of other ranks": ({"lengths": (4, 4, 4)}, "ValueError", "must hold one length for each of 2 ranks"),
    "own length": ({"lengths": (5, 5)}, "ValueError", "that of axis 0 of query, 4"),
    "lengths": ({"lengths": 4}, "TypeError", "lengths=4 must be a list or tuple of integers"),
    "stride of none": ({"stride": None}, "TypeError", "stride=None must hold integers"),
    "scale": ({"scale": "0.5"}, "TypeError", "scale='0.5' must be a real number"),
    "bias": ({"bias": torch.zeros(2, 5, 4)}, "ValueError", "bias.shape=(2, 5, 4)"),
    "extra": ({"additional_keys": torch.zeros(1, 2, 2, 4)}, "ValueError", "additional_keys and additional_values"),
    "impl": ({"impl": "cuda"}, "ValueError", "impl='cuda'"),
    "triton": ({"impl": "triton"}, "NotImplementedError", "impl='triton' cannot take this call"),
    "grid of another rank": (
        {"shape": (1, 24, 2, 4), "grid": (5, 5)},
        "ValueError",
        "grid=(5, 5) must hold the 24 tokens",
    ),
    "grid": ({"grid": 24}, "TypeError", "grid must be a list or tuple, got int"),
    "mesh": ({"mesh": "cpu"}, "TypeError", "mesh must be a DeviceMesh or a ProcessGroup, got str"),
}
DIFFERENT = {
    "window": (
        [{"window": 3}, {"window": (3, 4)}],
        "window must be the same on every rank of mesh, got [(3, 3), (3, 4)]",
    ),
    "axis": ([{"axis": 0}, {"axis": 1}], "axis must be the same on every rank of mesh, got [0, 1]"),
    "shape": ([{}, {"shape": (1, 4, 5, 2, 4)}], "query must be the same on every rank of mesh"),
    "dtype": ([{}, {"dtype": torch.float64}], "torch.float64"),
    "bias": ([{}, {"bias": torch.zeros(2, 5, 5)}], "bias must be the same on every rank of mesh, got [None, "),
    "window of a head": (
        [{}, {"window": [(3, 3), (1, 3)]}],
        "window must be the same on every rank of mesh, got [(3, 3), [",
    ),
    "gradient": ([{}, {"requires_grad": True}], "whether key or value requires a gradient must be the same"),
}


@pytest.mark.parametrize(("change", "kind", "message"), SAME_ON_EVERY_RANK.values(), ids=SAME_ON_EVERY_RANK.keys())
def test_wrong_arguments(ranks, change, kind, message):
    for found, text in ranks("refusal", [change] * 2, size=2):
        assert found == kind and message in text, text


@pytest.mark.parametrize(("changes", "message"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_ranks_that_differ_all_refuse(ranks, changes, message):
    for kind, text in ranks("refusal", changes, size=2):
        assert kind == "ValueError" and message in text, text


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"shape": (1, 0, 6, 2, 4)}, "ValueError", "must have no empty axis"),
        ({"bias": [0.0]}, "TypeError", "bias must be a tensor or None, got list"),
        ({"dtype": torch.float8_e4m3fn}, "TypeError", "query.dtype=torch.float8_e4m3fn must be float16"),
    ],
)
def test_what_one_rank_refuses_all_refuse(ranks, change, kind, message):
    ours, other = ranks("refusal", [{}, change], size=2)
    assert ours == ("ValueError", f"rank 1 of mesh refuses its arguments: {other[1]}")
    assert other[0] == kind and message in other[1]


def test_without_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        sharded_neighborhood_attention(*torch.zeros(3, 1, 4, 2, 4), mesh=None, window=3)


def test_cost_counts_the_tokens_that_masks_show():
    lengths, plane = (2, 3, 1, 18), 2 * 5 * 4 * 8 * 2  # batch, the other axis, key heads, head_dim, bytes
    axes = make_axes((24, 5), window=(3, 3), stride=(2, 1), dilation=(2, 1))
    mask = geometry.axis_mask(axes[0])
    costs = sharded_cost(axes, axis=0, lengths=lengths, heads=8, key_heads=4, head_dim=8, itemsize=2, batch=2)
    edges = [0, 2, 5, 6, 24]
    for rank, cost in enumerate(costs):
        seen = mask[edges[rank] : edges[rank + 1]].any(0).nonzero().flatten()
        needed = set(range(int(seen[0]), int(seen[-1]) + 1)) - set(range(edges[rank], edges[rank + 1]))
        assert cost.received == len(needed) * 2 * plane
        assert cost.queries == lengths[rank]
        inside = range(*interior(axes[0], (edges[rank], edges[rank + 1])))
        assert cost.interior == len(inside)
        assert cost.interior_flops == 4 * int(mask[list(inside)].sum()) * geometry.axis_pairs(axes[1]) * 2 * 8 * 8
    assert [cost.interior for cost in costs] == [0, 0, 0, 16]
    assert sum(cost.sent for cost in costs) == sum(cost.received for cost in costs)
    pairs = int(mask.sum()) * geometry.axis_pairs(axes[1])
    assert sum(cost.forward_flops for cost in costs) == 4 * pairs * 2 * 8 * 8


def test_even_pieces_are_those_of_torch():
    for length in range(1, 30):
        for parts in range(1, length + 1):
            assert split_evenly(length, parts) == tuple(map(len, torch.arange(length).tensor_split(parts)))


@pytest.mark.slow
def test_printed_costs(capsys):
    clip, heads = ["--shape", "30", "48", "80", "--window", "18", "24", "24"], ["--heads", "24", "--head-dim", "128"]
    print_costs([*clip, *heads, "--ranks", "2", "64"])
    text = capsys.readouterr().out
    assert "2     2   40 to 40    52         202.5          1.00       70%        24,192" in text
    assert "2 ranks, all keys: 675.0 MiB; exchange of heads: 675.0 MiB" in text
    with pytest.raises(SystemExit):
        print_costs(["--shape", "4", "--window", "5"])
    assert "window=5 on axis 0 must not exceed its length 4" in capsys.readouterr().err
